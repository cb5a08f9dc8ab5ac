package s3

import (
	"testing"

	"github.com/caddy-registry/mirror/internal/regtest/s3double"
	"github.com/caddy-registry/mirror/storage"
	"github.com/caddy-registry/mirror/storage/storagetest"
)

func TestStore(t *testing.T) {
	storagetest.Test(t, func(t *testing.T) storage.Store {
		return newDouble(t, s3double.Options{}, nil).openedAtOnce(t)
	})
}

func TestDistant(t *testing.T) {
	storagetest.TestDistant(t, func(t *testing.T) storagetest.Place {
		return newDouble(t, s3double.Options{}, nil).place(t)
	})
}

func TestDistantBelowPrefix(t *testing.T) {
	storagetest.TestDistant(t, func(t *testing.T) storagetest.Place {
		d := newDouble(t, s3double.Options{Page: 3}, nil)
		d.prefix = "some where/else"
		place := d.place(t)
		place.Brief = true
		return place
	})
}

// TestFaults runs the suites on places with the faults of the field.
func TestFaults(t *testing.T) {
	for _, c := range []struct {
		name   string
		quirks s3double.Quirks
		faults []s3double.Fault
		change func(*S3)
	}{
		{name: "Listing", quirks: s3double.Quirks{V1Only: true, Unordered: true, LaggingList: true}, change: func(s *S3) { s.List = "v1" }},
		{name: "Parts", quirks: s3double.Quirks{EqualParts: true, MaxParts: 2, NoListParts: true}, change: func(s *S3) { s.MaxParts = 2 }},
		{name: "Errors", faults: []s3double.Fault{
			{Every: 23, Status: 503, Code: "SlowDown"},
			{Spare: 7, Every: 29, Status: 500, Code: "InternalError", Did: true},
			{Spare: 14, Every: 31, Cut: true, Did: true},
			{Spare: 21, Every: 37, Cut: true},
		}},
	} {
		double := func(t *testing.T) *double {
			d := newDouble(t, s3double.Options{Quirks: c.quirks, Page: 2}, c.change)
			for _, fault := range c.faults {
				d.Strike(fault)
			}
			return d
		}
		t.Run(c.name+"Store", func(t *testing.T) {
			t.Parallel()
			storagetest.Test(t, func(t *testing.T) storage.Store { return double(t).openedAtOnce(t) })
		})
		t.Run(c.name+"Distant", func(t *testing.T) {
			storagetest.TestDistant(t, func(t *testing.T) storagetest.Place {
				d := double(t)
				// How a listing lags is the suite's own.
				d.Set(func(q *s3double.Quirks) { q.LaggingList = false })
				place := d.place(t)
				place.Brief = true
				return place
			})
		})
	}
}
