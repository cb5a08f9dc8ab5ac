package tree

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/failpoint"
)

const killDir, killPoint = "TREE_TEST_DIR", "TREE_TEST_POINT"

const (
	killOld, killNew = "an old layer", "a new layer"
	killAlone        = "a layer that no manifest names"
)

var (
	oldLayer, newLayer = digest.FromString(killOld), digest.FromString(killNew)
	alone              = digest.FromString(killAlone)
	newLong            = digest.SHA512.FromString(killNew)
	oldBody, newBody   = image(oldLayer), image(oldLayer, newLayer, newLong)
	oldImage, newImage = digest.FromString(oldBody), digest.FromString(newBody)
)

// kills are the points at which a process may die that pushes or deletes, what it
// does then, and what the next finds.
var kills = map[string]struct {
	prepare, do func(b *bench) error
	found       func(b *bench)
}{
	"claim.recorded":  {nil, (*bench).killHost, (*bench).foundHosted},
	"push.stored":     {nil, (*bench).killPush, func(b *bench) { b.wantMember("r", newLayer, false) }},
	"push.linked":     {nil, (*bench).killPush, (*bench).foundPushed},
	"push.synced":     {nil, (*bench).killPush, (*bench).foundPushed},
	"mount.linked":    {nil, (*bench).killMount, func(b *bench) { b.wantMember("s", oldLayer, true) }},
	"mount.synced":    {nil, (*bench).killMount, func(b *bench) { b.wantMember("s", oldLayer, true) }},
	"manifest.stored": {(*bench).killPush, (*bench).killManifest, func(b *bench) { b.wantNoManifest("r", newImage) }},
	"manifest.linked": {(*bench).killPush, (*bench).killManifest, func(b *bench) { b.wantManifest("r", newImage, newBody) }},
	"manifest.synced": {(*bench).killPush, (*bench).killManifest, func(b *bench) { b.wantManifest("r", newImage, newBody) }},
	"tag.indexed":     {(*bench).killImage, (*bench).killTag, func(b *bench) { b.wantTag("r", "v1", oldImage) }},
	"tag.linked":      {(*bench).killImage, (*bench).killTag, func(b *bench) { b.wantTag("r", "v1", newImage) }},
	"tag.synced":      {(*bench).killImage, (*bench).killTag, func(b *bench) { b.wantTag("r", "v1", newImage) }},
	"evict.untagged":  {nil, (*bench).killUntag, func(b *bench) { b.wantTag("r", "v1", "") }},
	"evict.unindexed": {nil, (*bench).killUntag, func(b *bench) { b.wantTag("r", "v1", "") }},
	"delete.untagged": {nil, (*bench).killDelete, func(b *bench) {
		b.wantTag("r", "v1", "")
		b.wantManifest("r", oldImage, oldBody)
	}},
	"evict.unmanifested": {nil, (*bench).killDelete, (*bench).foundDeleted},
	"delete.synced":      {nil, (*bench).killDelete, (*bench).foundDeleted},
	"evict.unlinked":     {nil, (*bench).killUnlink, func(b *bench) { b.wantMember("r", alone, false) }},
}

func (b *bench) killHost() error { return b.Host(b.t.Context(), "new") }

func (b *bench) killPush() error {
	return b.PutBlob(b.t.Context(), "r", []digest.Digest{newLayer, newLong}, b.upload(killNew), int64(len(killNew)))
}

func (b *bench) killMount() error { return second(b.Mount(b.t.Context(), "s", "r", oldLayer)) }

func (b *bench) killManifest() error {
	return second(b.PutManifest(b.t.Context(), "r", newImage, []byte(newBody), b.complete("r")))
}

func (b *bench) killImage() error { return errors.Join(b.killPush(), b.killManifest()) }

func (b *bench) killTag() error {
	return b.SetTag(b.t.Context(), "r", "v1", newImage, time.Now(), nil)
}

func (b *bench) killUntag() error { return second(b.DeleteTag(b.t.Context(), "r", "v1", nil)) }

func (b *bench) killDelete() error {
	return second(b.DeleteManifest(b.t.Context(), "r", oldImage, nil))
}

func (b *bench) killUnlink() error { return b.DeleteBlob(b.t.Context(), "r", alone) }

func (b *bench) foundHosted() {
	if r, err := b.Record(b.t.Context(), "new"); err != nil || r.Class != Hosted {
		b.t.Errorf("%+v, %v", r, err)
	}
}

func (b *bench) foundPushed() {
	for _, d := range []digest.Digest{newLayer, newLong} {
		if m := b.wantMember("r", d, true); m.Canonical != newLayer {
			b.t.Errorf("%+v", m)
		}
	}
	b.opens(newLayer, killNew)
}

func (b *bench) foundDeleted() {
	b.wantTag("r", "v1", "")
	b.wantNoManifest("r", oldImage)
}

// TestKilled is the process that TestKill starts, which dies.
func TestKilled(t *testing.T) {
	dir, point := os.Getenv(killDir), os.Getenv(killPoint)
	if dir == "" {
		return
	}
	b := &bench{t: t, dir: dir}
	b.open()
	b.push("r", killOld)
	b.push("r", killAlone)
	b.pushManifest("r", oldBody)
	b.ok(b.SetTag(t.Context(), "r", "v1", oldImage, time.Now(), nil))
	c := kills[point]
	if c.prepare != nil {
		b.ok(c.prepare(b))
	}
	failpoint.Set(func(name string) {
		if name == point {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	})
	b.ok(c.do(b))
	t.Fatalf("%s was not reached", point)
}

// TestKill: a process that dies between two steps of a push or of a deletion leaves
// nothing that can be seen and is not whole, and who does it again gets it done.
func TestKill(t *testing.T) {
	for point, c := range kills {
		t.Run(point, func(t *testing.T) {
			dir := t.TempDir()
			child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKilled$", "-test.timeout=100s")
			child.Env = append(os.Environ(), killDir+"="+dir, killPoint+"="+point)
			said, err := child.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("it was not killed: %v\n%s", err, said)
			}
			b := &bench{t: t, dir: dir}
			b.open()
			t.Cleanup(func() {
				b.Tree.Close()
				b.store.Close()
			})
			wholly := func() {
				t.Helper()
				for _, repository := range []string{"r", "s"} {
					b.whole(repository)
				}
			}
			wholly()
			c.found(b)
			if r, err := b.Record(t.Context(), "r"); err != nil || r.Class != Hosted {
				t.Errorf("%+v, %v", r, err)
			}
			if err := c.do(b); err != nil && !errors.Is(err, fs.ErrNotExist) { // deleted already
				t.Errorf("done again: %v", err)
			}
			wholly()
			b.ok(b.killImage())
			b.ok(b.killTag())
			wholly()
			b.wantTag("r", "v1", newImage)
			b.foundPushed()
		})
	}
}
