// Package backing keeps backing images: the disk images that virtual machines'
// volumes begin with. It takes them in, as uploads or from a URL, judges whether
// Longhorn can use them, names their versions, and registers these with Longhorn.
// It knows no HTTP but as a client: package backing/api speaks the protocol.
//
// # What there is
//
// An image has a name and versions. A version is immutable: a file with two
// digests. A tag is a name for a version that can be moved, and remembers what it
// meant. A registration is a version's place in a Longhorn cluster.
//
// # Where it lies
//
// A version's bytes are a blob of the hosted repository <prefix>/<image>, named by
// an artifact manifest there, which the version's name and its tags are tags of. So
// budgets, the collector, the scrub and every registry client understand it.
// What a manifest cannot say is a record in the store: one of the image, one of each
// version, one of each registration. The record of a version is written last and
// removed first: what has none is no version, and what it names is collected as
// anything is that nothing names.
//
// Records are read when the library starts, and kept in memory; while another
// process shares the store they are read again after two seconds. What is under way
// (uploads, jobs, with their secrets) belongs to one machine, and lies below
// storage.Local.
package backing

import (
	"net/url"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/backing/probe"
	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/hosted"
	"github.com/caddy-registry/mirror/internal/tree"
	"github.com/caddy-registry/mirror/storage"
)

// Parts are what a library works with. It closes none of them, and they outlive it.
type Parts struct {
	Store  storage.Store
	Tree   *tree.Tree
	Hosted *hosted.Registry
	Fills  *fill.Table
	// Suspect is told of a blob that the store delivers wrong; nil: nobody is.
	Suspect func(digest.Digest)
	Log     *zap.Logger
}

// Settings are what a configuration changes.
type Settings struct {
	// Prefix is the repository that those of all images lie under.
	// Empty: there are no backing images in this configuration, and nothing is done.
	Prefix string
	// PublicURL is where Longhorn reaches the API, without a slash at its end;
	// nil: nobody has said.
	PublicURL *url.URL
	// Compat says what becomes of an image that Longhorn cannot use.
	Compat Compat
	// MaxImage is how large an image may be, in bytes; 0: as large as a blob.
	MaxImage int64
	// Clusters are Longhorn's, by unique names.
	Clusters []Cluster
	// Private says that not everybody may read: an address that is given to
	// Longhorn has a token in its path then.
	Private bool
	// Pull is how URLs are pulled from.
	Pull PullSettings
}

// Compat is what becomes of an image that Longhorn cannot use.
type Compat string

const (
	Enforce Compat = "enforce" // it is refused
	Warn    Compat = "warn"    // it is taken, and says what is wrong
	Off     Compat = "off"     // as Warn; only what is dangerous is refused, as always
)

// Image is an image as it is told of.
type Image struct {
	Name      string            `json:"name"`
	Labels    map[string]string `json:"labels"`
	Protected bool              `json:"protected"` // nothing of it may be deleted
	CreatedAt time.Time         `json:"createdAt"`
	Tags      map[string]Tag    `json:"tags"`
	Versions  []Version         `json:"versions"` // the latest first
	// Revision changes with everything that can be edited: it is the ETag.
	Revision string `json:"-"`
	// Error is why nothing of it can be changed: its record cannot be read.
	Error string `json:"error,omitempty"`
}

// Tag is what a tag means.
type Tag struct {
	Version string     `json:"version"`
	Since   time.Time  `json:"since"`
	History []TagEvent `json:"history,omitempty"` // what it meant before, the latest first; 100 at most
}

// TagEvent is that a tag meant a version from a time on.
type TagEvent struct {
	Version string    `json:"version"`
	Since   time.Time `json:"since"`
}

// State is where a version stands.
type State string

const (
	Receiving State = "receiving"
	Fetching  State = "fetching"
	Verifying State = "verifying"
	Ready     State = "ready"
	Failed    State = "failed"
	Deleting  State = "deleting"
)

// Version is one version of an image. One that is on its way is of a job, and has no
// digests yet.
type Version struct {
	Name          string            `json:"name"` // of the image
	Version       string            `json:"version"`
	State         State             `json:"state"`
	Format        probe.Format      `json:"format,omitempty"`
	Size          int64             `json:"size"`
	VirtualSize   int64             `json:"virtualSize"`
	Digests       Digests           `json:"digests"`
	Probe         *probe.Report     `json:"probe,omitempty"`
	Source        *Source           `json:"source,omitempty"` // without secrets
	Progress      *Progress         `json:"progress,omitempty"`
	Tags          []string          `json:"tags"`
	Labels        map[string]string `json:"labels"` // of the image
	Protected     bool              `json:"protected"`
	CreatedAt     time.Time         `json:"createdAt"`
	URLs          URLs              `json:"urls"`
	Registrations []Registration    `json:"registrations"`
	Job           string            `json:"job,omitempty"`
	Error         string            `json:"error,omitempty"`
}

// Digests are those of a file.
type Digests struct {
	SHA256 digest.Digest `json:"sha256,omitempty"`
	SHA512 digest.Digest `json:"sha512,omitempty"`
}

// Progress is how far something has come, in bytes. Total is -1 where nobody knows.
type Progress struct {
	Received int64 `json:"received"`
	Total    int64 `json:"total"`
}

// URLs are where a version can be had. File is absolute if there is a PublicURL.
type URLs struct {
	File string `json:"file,omitempty"`
	OCI  string `json:"oci,omitempty"`
}

// Draft is what is to become a version.
type Draft struct {
	Name    string
	Version string // empty: the next of v1, v2, …
	Tags    []string
	Labels  map[string]string // added to the image's
	// SHA256 and SHA512 are what the file as it comes must have; empty: whatever it has.
	SHA256, SHA512 digest.Digest
	// Decompress is auto, gz, xz, zst, or none, which "" means: the file is kept
	// as it comes.
	Decompress string
	// Register are the clusters to register it with.
	Register []string
}
