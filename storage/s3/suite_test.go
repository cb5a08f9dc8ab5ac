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
		return d.place(t)
	})
}

// TestFaults runs the suites on places with the faults of the field.
func TestFaults(t *testing.T) {
	for _, c := range []struct {
		name   string
		quirks s3double.Quirks
		fault  s3double.Fault
		change func(*S3)
	}{
		{name: "LaggingList", quirks: s3double.Quirks{LaggingList: true}},
		{name: "V1Only", quirks: s3double.Quirks{V1Only: true}, change: func(s *S3) { s.List = "v1" }},
		{name: "Unordered", quirks: s3double.Quirks{Unordered: true}},
		{name: "EqualParts", quirks: s3double.Quirks{EqualParts: true}},
		{name: "PartCeiling", quirks: s3double.Quirks{MaxParts: 2}, change: func(s *S3) { s.MaxParts = 2 }},
		{name: "NoListParts", quirks: s3double.Quirks{NoListParts: true}},
		{name: "ShortListParts", quirks: s3double.Quirks{ShortParts: 1}},
		{name: "EndlessListParts", quirks: s3double.Quirks{EndlessParts: true}},
		{name: "SlowDown", fault: s3double.Fault{Every: 13, Status: 503, Code: "SlowDown"}},
		{name: "InternalError", fault: s3double.Fault{Every: 13, Status: 500, Code: "InternalError", Did: true}},
		{name: "LostAnswers", fault: s3double.Fault{Every: 13, Cut: true, Did: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			double := func(t *testing.T) *double {
				d := newDouble(t, s3double.Options{Quirks: c.quirks, Page: 10}, c.change)
				if c.fault != (s3double.Fault{}) {
					d.Strike(c.fault)
				}
				return d
			}
			t.Run("Store", func(t *testing.T) {
				storagetest.Test(t, func(t *testing.T) storage.Store { return double(t).openedAtOnce(t) })
			})
			// How a listing lags is the suite's own.
			if !c.quirks.LaggingList {
				t.Run("Distant", func(t *testing.T) {
					storagetest.TestDistant(t, func(t *testing.T) storagetest.Place { return double(t).place(t) })
				})
			}
		})
	}
}
