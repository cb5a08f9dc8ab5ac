package backing

import (
	"context"
	"time"
)

// Cluster is a Longhorn to register with.
type Cluster struct {
	Name  string
	URL   string // of its manager; a path and a trailing /v1 are permitted
	Token string // for a proxy in front of it; empty: none
	Mode  Mode   // empty: Download with a PublicURL, else PushUpload
}

// Mode is how Longhorn gets the bytes.
type Mode string

const (
	Download   Mode = "download" // Longhorn fetches them from PublicURL, again if it loses them
	PushUpload Mode = "upload"   // they are sent to Longhorn, which cannot get them again
)

// RegistrationOptions are how a version is registered.
type RegistrationOptions struct {
	Cluster           string   `json:"cluster"`           // empty: the only one
	Mode              Mode     `json:"mode"`              // empty: the cluster's
	Name              string   `json:"name"`              // in Longhorn; empty: made of the image's and the digest
	MinNumberOfCopies int      `json:"minNumberOfCopies"` // 0: Longhorn's default
	NodeSelector      []string `json:"nodeSelector"`
	DiskSelector      []string `json:"diskSelector"`
	// Ensure has it made again where it is lost or has drifted.
	Ensure bool `json:"ensure"`
}

// Registration is a version in a cluster.
type Registration struct {
	Cluster           string            `json:"cluster"`
	Name              string            `json:"name"` // as Longhorn has it
	Mode              Mode              `json:"mode"`
	State             RegistrationState `json:"state"`
	Progress          int               `json:"progress"` // percent
	Message           string            `json:"message,omitempty"`
	URL               string            `json:"url,omitempty"` // that Longhorn was given
	Adopted           bool              `json:"adopted,omitempty"`
	Ensure            bool              `json:"ensure,omitempty"`
	MinNumberOfCopies int               `json:"minNumberOfCopies,omitempty"`
	Copies            map[string]string `json:"copies,omitempty"` // disk or node → state
	CreatedAt         time.Time         `json:"createdAt"`
	CheckedAt         time.Time         `json:"checkedAt,omitzero"`
}

// RegistrationState is where a registration stands.
type RegistrationState string

const (
	Pending     RegistrationState = "pending"
	Downloading RegistrationState = "downloading"
	InLonghorn  RegistrationState = "ready"
	Degraded    RegistrationState = "degraded"
	RegFailed   RegistrationState = "failed"
	Stuck       RegistrationState = "stuck"
	Drifted     RegistrationState = "drifted"
	Conflict    RegistrationState = "conflict"
	Missing     RegistrationState = "missing"
	Unknown     RegistrationState = "unknown" // Longhorn cannot be asked
	Removing    RegistrationState = "removing"
)

// Register registers a version with a cluster, and goes on with it behind the caller.
func (l *Library) Register(ctx context.Context, name, reference string, o RegistrationOptions) (Registration, error) {
	panic("seam")
}

// Unregister deletes a version's backing image in Longhorn, and then its registration.
func (l *Library) Unregister(ctx context.Context, name, reference, cluster string) error {
	panic("seam")
}

// Manifest is YAML that can be applied as it is: storageclass, backingimage, datavolume.
func (l *Library) Manifest(ctx context.Context, name, reference, kind, cluster string) ([]byte, error) {
	panic("seam")
}
