package retain

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/catalog"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/tree"
)

// ErrPattern is wrapped by the error of a Purge of what is no pattern.
var ErrPattern = errors.New("no pattern")

// Purge begins to remove every mirrored tag and manifest that the pattern
// matches: a repository in which "*" stands for part of a name and "**" for any
// names, and ":" with a tag in which "*" stands for part of it, or "@" with a
// digest; without either the whole repository. What is pinned stays, and so does
// a manifest as long as an index that stays names it. While another process uses the
// store the error is [ErrShared]: a blob may be what that one is just linking into a
// hosted repository.
func (k *Keeper) Purge(pattern string, dry bool) (Job, error) {
	p, err := parsePattern(pattern)
	if err != nil {
		return Job{}, err
	}
	if err := k.afar.mayRemove(); err != nil {
		return Job{}, err
	}
	return k.start(Job{Kind: kindPurge, Unit: "repositories", Pattern: pattern, DryRun: dry}, func(ctx context.Context, j *job) error {
		k.log.Info("purge", zap.String("job", j.ID), zap.String("pattern", pattern), zap.Bool("dry_run", dry))
		c, err := k.whole(ctx, j)
		if err == nil {
			err = take(ctx, k.jobs.turn)
		}
		if err != nil {
			return err
		}
		defer func() { <-k.jobs.turn }()
		j.update(func(now *Job) { now.Done, now.Total = 0, 0 })
		return (&purge{Keeper: k, job: j, catalog: c, pattern: p, dry: dry}).run(ctx)
	})
}

// A pattern is what a purge is about.
type pattern struct {
	repository []string // components; "**" is any number of them
	tag        string   // "": not about tags
	digest     digest.Digest
}

func parsePattern(s string) (pattern, error) {
	wrong := func(what string) (pattern, error) {
		return pattern{}, fmt.Errorf("%q is %w: %s; write a repository as it is stored, such as docker.io/library/nginx, with * for part of a name and ** for any names, and after it :tag or @digest if it is not about all of it", s, ErrPattern, what)
	}
	var p pattern
	name := s
	if at := strings.IndexByte(s, '@'); at >= 0 {
		d, err := oci.ParseDigest(s[at+1:])
		if err != nil {
			return wrong("what follows @ is no digest")
		}
		name, p.digest = s[:at], d
	} else if at := strings.LastIndexByte(s, ':'); at > strings.LastIndexByte(s, '/') {
		name, p.tag = s[:at], s[at+1:]
		if !oci.ValidTag(strings.ReplaceAll(p.tag, "*", "a")) {
			return wrong("what follows : is no tag")
		}
	}
	p.repository = strings.Split(name, "/")
	for _, component := range p.repository {
		if !oci.ValidComponent(strings.ReplaceAll(component, "*", "a")) {
			return wrong(fmt.Sprintf("%q is no part of a repository's name", component))
		}
	}
	return p, nil
}

// matches reports whether a repository is meant.
func (p pattern) matches(repository string) bool {
	return anyNames(p.repository, strings.Split(repository, "/"))
}

func anyNames(pattern, names []string) bool {
	if len(pattern) == 0 {
		return len(names) == 0
	}
	if pattern[0] != "**" {
		return len(names) > 0 && anyText(pattern[0], names[0]) && anyNames(pattern[1:], names[1:])
	}
	for i := range len(names) + 1 {
		if anyNames(pattern[1:], names[i:]) {
			return true
		}
	}
	return false
}

// anyText reports whether a text matches a pattern in which "*" is any text.
func anyText(pattern, s string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return s == pattern
	}
	first, last := parts[0], parts[len(parts)-1]
	if len(s) < len(first)+len(last) || !strings.HasPrefix(s, first) || !strings.HasSuffix(s, last) {
		return false
	}
	s = s[len(first) : len(s)-len(last)]
	for _, part := range parts[1 : len(parts)-1] {
		at := strings.Index(s, part)
		if at < 0 {
			return false
		}
		s = s[at+len(part):]
	}
	return true
}

// A purge is one under way.
type purge struct {
	*Keeper
	job     *job
	catalog *catalog.Catalog
	pattern pattern
	dry     bool
	pace    pace
}

func (p *purge) run(ctx context.Context) error {
	if err := p.Flush(ctx); err != nil {
		return err
	}
	return pages(ctx, p.catalog.Mirrored, func(name string) error {
		if !p.pattern.matches(name) {
			return nil
		}
		// The store is what says whether it is mirrored.
		r, err := p.tree.Record(ctx, name)
		if errors.Is(err, fs.ErrNotExist) || err == nil && r.Class != tree.Mirrored {
			return nil
		}
		p.job.update(func(now *Job) { now.Total++ })
		if err == nil {
			err = p.repository(ctx, name)
		}
		if err != nil {
			return fmt.Errorf("purging %s: %w", name, err)
		}
		p.job.update(func(now *Job) { now.Done++ })
		return nil
	})
}

// repository purges what is meant of one repository.
func (p *purge) repository(ctx context.Context, name string) error {
	if err := p.Flush(ctx); err != nil {
		return err
	}
	known, err := p.catalog.Names(ctx, name)
	if err != nil {
		return err
	}
	bytes := p.job.snapshot().Bytes
	// Tags, what they mean, and what of that no other tag needs.
	for tag, d := range known.Tags {
		switch {
		case p.pattern.tag != "" && !anyText(p.pattern.tag, tag), p.pattern.digest != "" && p.pattern.digest != d:
			continue
		case known.Pins[tag] || known.Pins[d.String()]:
			p.job.update(func(now *Job) { now.Kept++ })
			continue
		}
		if err := p.root(ctx, catalog.Root{Repository: name, Tag: tag, Digest: d}); err != nil {
			return err
		}
	}
	if p.pattern.tag != "" {
		return nil
	}
	for d := range known.Manifests {
		if p.pattern.digest != "" && p.pattern.digest != d {
			continue
		}
		if known.Pins[d.String()] {
			p.job.update(func(now *Job) { now.Kept++ })
			continue
		}
		if err := p.root(ctx, catalog.Root{Repository: name, Digest: d}); err != nil {
			return err
		}
	}
	switch {
	case p.pattern.digest != "":
		return nil
	case p.dry:
		return p.estimate(ctx, known, bytes)
	}
	return p.rest(ctx, name)
}

// estimate says how much a dry run of a whole repository would free: what roots
// share is freed by none of them alone. before is what others would free.
func (p *purge) estimate(ctx context.Context, known catalog.Names, before int64) error {
	if len(known.Pins) > 0 {
		return nil
	}
	own := before
	for _, all := range []map[digest.Digest]bool{known.Manifests, known.Links} {
		for d := range all {
			owners, err := p.catalog.Owners(ctx, d, 2)
			if err != nil {
				return err
			}
			info, err := p.tree.StatBlob(ctx, d)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			if len(owners) == 1 {
				own += info.Size
			}
			if err := p.pace.rest(ctx); err != nil {
				return err
			}
		}
	}
	p.job.update(func(now *Job) { now.Bytes = max(now.Bytes, own) })
	return nil
}

// rest removes what no manifest names, if no manifest is left.
func (p *purge) rest(ctx context.Context, name string) error {
	w := p.watch()
	defer w.end()
	if err := p.Flush(ctx); err != nil {
		return err
	}
	known, err := p.catalog.Names(ctx, name)
	if err != nil || len(known.Manifests)+len(known.Tags) > 0 {
		return err
	}
	var links []digest.Digest
	for d := range known.Links {
		err := p.tree.Unlink(ctx, name, d, w.needs(name, d))
		if errors.Is(err, tree.ErrNeeded) {
			continue
		}
		if err != nil {
			return err
		}
		links = append(links, d)
	}
	if err := p.Flush(ctx); err != nil {
		return err
	}
	if err := p.blobs(ctx, links); err != nil || len(known.Pins) > 0 {
		return err
	}
	return p.tree.Forget(ctx, name)
}

// root removes one root.
func (p *purge) root(ctx context.Context, root catalog.Root) error {
	if err := p.pace.rest(ctx); err != nil {
		return err
	}
	what := root.Repository + ":" + root.Tag
	if root.Tag == "" || p.dry {
		if err := p.Flush(ctx); err != nil {
			return err
		}
		goes, err := p.catalog.Removal(ctx, root)
		if err != nil {
			return err
		}
		if root.Tag == "" {
			what = root.Repository + "@" + root.Digest.String()
			if !slices.Contains(goes.Manifests, root.Digest) {
				return nil // something else needs it, or it has gone with that
			}
		}
		if p.dry {
			p.job.found(what, goes.Bytes)
			return nil
		}
	}
	p.eviction.running.Lock()
	gone, err := p.removeRoot(ctx, p.catalog, root, 0)
	p.eviction.running.Unlock()
	if errors.Is(err, tree.ErrNeeded) {
		err = nil // somebody has just come for it
	}
	if gone.Roots > 0 {
		p.job.found(what, gone.Bytes)
	}
	return err
}

// blobs deletes those that nobody needs any more.
func (p *purge) blobs(ctx context.Context, blobs []digest.Digest) error {
	for _, d := range blobs {
		info, err := p.tree.StatBlob(ctx, d)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		removed, err := p.tree.RemoveBlob(ctx, d, p.needed(ctx, d))
		if err != nil {
			return err
		}
		if removed {
			p.job.update(func(now *Job) { now.Bytes += info.Size })
		}
	}
	return p.pace.rest(ctx)
}
