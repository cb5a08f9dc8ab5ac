package hosted

import (
	"context"
	"time"
)

// UploadLife is how long uploads are kept.
const UploadLife = uploadLife

// MaxUploads is how many there may be.
const MaxUploads = maxUploads

// At gives a registry a clock.
func (h *Registry) At(now func() time.Time) { h.now = now }

// Sweep removes uploads that have expired.
func (h *Registry) Sweep() { h.sweep() }

// SweepDistant removes uploads that have expired at the distant place.
func (h *Registry) SweepDistant(ctx context.Context) { h.sweepDistant(ctx) }

// Every is how many bytes lie between two states of an upload under way.
func (h *Registry) Every(n int64) { h.run = n }
