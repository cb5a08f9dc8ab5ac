package tree

import (
	"context"
	"errors"
	"io/fs"
	"iter"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/layout"
	"github.com/caddy-registry/mirror/internal/oci"
)

// What is here is for comparing a store with what somebody remembers of it. It
// reads the store and not memory, and leaves nothing in memory.

// linkSize is the bytes of a link to a sha256.
const linkSize = int64(len("sha256:") + 64)

// A Listed is a tag, a link or a blob as a listing finds it.
type Listed struct {
	Tag    string
	Digest digest.Digest // what a tag means
	// Whole says that a link has the size of one, and no loss of power may have
	// damaged it.
	Whole    bool
	Size     int64 // of a blob
	Doubtful bool
}

// Kept yields the names of all repositories of which there may be anything in the
// store: manifests, layers, or a record. A name may come twice.
func (t *Tree) Kept(ctx context.Context) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		manifestsOrLayers := func(component string, dir bool) bool {
			return dir && (component == "_manifests" || component == "_layers")
		}
		if !t.kept(ctx, layout.Repositories, "", manifestsOrLayers, yield) {
			return
		}
		record := func(component string, dir bool) bool { return !dir && component == "_record.json" }
		t.kept(ctx, layout.Records, "", record, yield)
	}
}

// kept visits a name and those below it, and yields each in whose directory
// there is something that shows a repository. It reports whether to go on.
func (t *Tree) kept(ctx context.Context, root, name string, shows func(component string, dir bool) bool, yield func(string, error) bool) bool {
	prefix := root
	if name != "" {
		prefix += name + "/"
	}
	var below []string
	found := false
	for info, err := range t.store.List(ctx, prefix, false) {
		if err != nil {
			yield("", err)
			return false
		}
		component, dir := strings.CutSuffix(strings.TrimPrefix(info.Key, prefix), "/")
		if dir && oci.ValidComponent(component) {
			below = append(below, component)
		} else if name != "" && shows(component, dir) {
			found = true
		}
	}
	if found && !yield(name, nil) {
		return false
	}
	for _, component := range below {
		child := component
		if name != "" {
			child = name + "/" + component
		}
		if !t.kept(ctx, root, child, shows, yield) {
			return false
		}
	}
	return true
}

// IsKept reports whether there is anything of a repository in the store: empty
// directories are nothing.
func (t *Tree) IsKept(ctx context.Context, repository string) (bool, error) {
	if _, err := t.store.Stat(ctx, layout.Record(repository)); !errors.Is(err, fs.ErrNotExist) {
		return err == nil, err
	}
	for _, prefix := range []string{layout.Manifests(repository), layout.Layers(repository)} {
		for _, err := range t.store.List(ctx, prefix, true) {
			return err == nil, err
		}
	}
	return false, nil
}

// ListTags yields the tags of a repository, with what they mean. Those whose
// link says nothing are left out.
func (t *Tree) ListTags(ctx context.Context, repository string) iter.Seq2[Listed, error] {
	return func(yield func(Listed, error) bool) {
		prefix := layout.Tags(repository)
		for info, err := range t.store.List(ctx, prefix, false) {
			if err != nil {
				yield(Listed{}, err)
				return
			}
			tag, dir := strings.CutSuffix(strings.TrimPrefix(info.Key, prefix), "/")
			if !dir || !oci.ValidTag(tag) {
				continue
			}
			d, err := t.link(ctx, layout.TagLink(repository, tag))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if !yield(Listed{Tag: tag, Digest: d}, err) || err != nil {
				return
			}
		}
	}
}

// ListManifests yields the manifests that are linked in a repository, by their
// sha256.
func (t *Tree) ListManifests(ctx context.Context, repository string) iter.Seq2[Listed, error] {
	return t.links(ctx, layout.Revisions(repository))
}

// ListLinks yields the blobs that are linked in a repository, by their sha256.
func (t *Tree) ListLinks(ctx context.Context, repository string) iter.Seq2[Listed, error] {
	return t.links(ctx, layout.Layers(repository))
}

// links leaves out links by other digests: what they lead to has one by its
// sha256 beside it.
func (t *Tree) links(ctx context.Context, prefix string) iter.Seq2[Listed, error] {
	return func(yield func(Listed, error) bool) {
		for info, err := range t.store.List(ctx, prefix+digest.Canonical.String()+"/", true) {
			if err != nil {
				yield(Listed{}, err)
				return
			}
			d, ok := layout.DigestOf(info.Key)
			if ok && !yield(Listed{Digest: d, Whole: info.Size == linkSize && !info.Doubtful}, nil) {
				return
			}
		}
	}
}

// ListBlobs yields the blobs whose sha256 begins with two hexadecimal digits.
func (t *Tree) ListBlobs(ctx context.Context, digits string) iter.Seq2[Listed, error] {
	return func(yield func(Listed, error) bool) {
		for info, err := range t.store.List(ctx, layout.Blobs(digits), true) {
			if err != nil {
				yield(Listed{}, err)
				return
			}
			d, ok := layout.BlobOf(info.Key)
			if ok && !yield(Listed{Digest: d, Size: info.Size, Doubtful: info.Doubtful}, nil) {
				return
			}
		}
	}
}
