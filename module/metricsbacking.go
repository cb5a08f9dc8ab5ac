package module

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-registry/mirror/internal/backing"
)

var (
	backingCount         = storeSeries("backing_images", "Backing images.")
	backingVersions      = storeSeries("backing_image_versions", "Versions of backing images that are ready.")
	backingBytes         = storeSeries("backing_image_bytes", "Bytes of the files of those versions, shared ones counted once.")
	backingRegistrations = storeSeries("backing_image_registrations", "Registrations of versions with Longhorn, by their state.", "state")
	backingJobs          = storeSeries("backing_image_jobs", "Jobs that run or have ended within a day, by their state.", "state")
)

// backingUsed is how many backing images there are, and how they do.
type backingUsed struct {
	Images        int64                               `json:"images"`
	Versions      int64                               `json:"versions"` // that are ready
	Bytes         int64                               `json:"bytes"`    // of their files, shared ones once
	Registrations map[backing.RegistrationState]int64 `json:"registrations,omitempty"`
	Jobs          map[backing.JobState]int64          `json:"jobs,omitempty"`
}

// backingUsed counts what the library has in memory; nil: there are no backing images
// in this configuration.
func (o *opened) backingUsed(ctx context.Context) (*backingUsed, error) {
	if !o.hasImages.Load() {
		return nil, nil
	}
	used := backingUsed{Registrations: map[backing.RegistrationState]int64{}, Jobs: map[backing.JobState]int64{}}
	counted := map[digest.Digest]bool{}
	for after := ""; ; {
		images, next, err := o.images.Images(ctx, backing.Query{After: after, Limit: 1000})
		if err != nil {
			return nil, err
		}
		for _, image := range images {
			used.Images++
			for _, v := range image.Versions {
				if v.State != backing.Ready {
					continue
				}
				used.Versions++
				if !counted[v.Digests.SHA512] {
					counted[v.Digests.SHA512] = true
					used.Bytes += v.Size
				}
				for _, r := range v.Registrations {
					used.Registrations[r.State]++
				}
			}
		}
		if next == "" {
			break
		}
		after = next
	}
	jobs, err := o.images.Jobs(ctx)
	if err != nil {
		return nil, err
	}
	for _, job := range jobs {
		used.Jobs[job.State]++
	}
	return &used, nil
}

func (s *state) collectBacking(ctx context.Context, send func(desc *prometheus.Desc, kind prometheus.ValueType, value int64, labels ...string)) {
	used, err := s.works.Load().backingUsed(ctx)
	if err != nil || used == nil {
		return // the log tells of records that cannot be read
	}
	send(backingCount, prometheus.GaugeValue, used.Images)
	send(backingVersions, prometheus.GaugeValue, used.Versions)
	send(backingBytes, prometheus.GaugeValue, used.Bytes)
	for state, n := range used.Registrations {
		send(backingRegistrations, prometheus.GaugeValue, n, string(state))
	}
	for state, n := range used.Jobs {
		send(backingJobs, prometheus.GaugeValue, n, string(state))
	}
}

func (b *backingUsed) print(w io.Writer) error {
	return table(w, func(line func(...string)) {
		line("backing images", fmt.Sprintf("%s, %s, %s", some(b.Images, "image"), some(b.Versions, "version"), size(b.Bytes)))
		for _, state := range slices.Sorted(maps.Keys(b.Registrations)) {
			line("in Longhorn", fmt.Sprintf("%s %s", number(b.Registrations[state]), state))
		}
		for _, state := range slices.Sorted(maps.Keys(b.Jobs)) {
			line("jobs", fmt.Sprintf("%s %s", number(b.Jobs[state]), state))
		}
	})
}
