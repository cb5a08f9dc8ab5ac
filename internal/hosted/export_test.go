package hosted

import "time"

// UploadLife is how long uploads are kept.
const UploadLife = uploadLife

// MaxUploads is how many there may be.
const MaxUploads = maxUploads

// At gives a registry a clock.
func (h *Registry) At(now func() time.Time) { h.now = now }

// Sweep removes uploads that have expired.
func (h *Registry) Sweep() { h.sweep() }
