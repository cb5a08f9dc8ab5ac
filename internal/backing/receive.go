package backing

import (
	"context"
	"time"

	"github.com/caddy-registry/mirror/internal/hosted"
)

// An Upload is an image that is being uploaded. It outlives the process for a day.
type Upload struct{}

// Receive begins an upload. size is that of the file, or -1. The draft may be
// incomplete, and have no name yet: Finish is told the rest.
func (l *Library) Receive(ctx context.Context, d Draft, size int64) (*Upload, error) { panic("seam") }

// Upload returns an upload that is not finished, by its ID.
func (l *Library) Upload(ctx context.Context, id string) (*Upload, error) { panic("seam") }

func (u *Upload) ID() string         { panic("seam") }
func (u *Upload) Draft() Draft       { panic("seam") } // as it was begun with
func (u *Upload) Size() int64        { panic("seam") } // of the file, or -1
func (u *Upload) Offset() int64      { panic("seam") } // how many bytes have come
func (u *Upload) Expires() time.Time { panic("seam") }

// Append adds what a request brings; see hosted.Upload.
func (u *Upload) Append(ctx context.Context, body hosted.Body) (int64, error) { panic("seam") }

// Finish makes a version of what has come. created is false where the image has a
// version with the same bytes already: that is returned. An upload that is refused is
// gone; one that the store could not take may be finished again.
func (u *Upload) Finish(ctx context.Context, d Draft) (v Version, created bool, err error) {
	panic("seam")
}

// Cancel ends an upload.
func (u *Upload) Cancel(ctx context.Context) error { panic("seam") }
