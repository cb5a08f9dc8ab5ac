package module_test

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// meanwhile has one request stop where it comes to a failpoint for the first time,
// and other requests begin there. Those may wait for the first; it goes on once
// they have ended, or have had the time to come as far as they can. The answers are
// in order.
func (m *mirror) meanwhile(at string, first func() *answer, others ...func() *answer) []*answer {
	m.t.Helper()
	reached, goOn := make(chan struct{}), make(chan struct{})
	var once atomic.Bool
	failpoint.Set(func(name string) {
		if name == at && once.CompareAndSwap(false, true) {
			close(reached)
			<-goOn
		}
	})
	defer failpoint.Set(nil)
	answers := make([]*answer, 1+len(others))
	var all, rest sync.WaitGroup
	all.Go(func() { answers[0] = first() })
	select {
	case <-reached:
	case <-time.After(time.Minute):
		close(goOn)
		all.Wait()
		m.t.Fatalf("the first request does not come to %s: %+v", at, answers[0])
	}
	for i, other := range others {
		rest.Go(func() { answers[1+i] = other() })
	}
	ended := make(chan struct{})
	go func() {
		rest.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(50 * time.Millisecond):
	}
	close(goOn)
	<-ended
	all.Wait()
	return answers
}

// asking is a request for meanwhile.
func (p pusher) asking(method, to string, body []byte, header ...string) func() *answer {
	return func() *answer {
		a, err := p.try(method, to, body, header...)
		if err != nil {
			p.t.Errorf("%s %s: %v", method, to, err)
			return &answer{}
		}
		return a
	}
}

func (p pusher) pushing(ref string, manifest regtest.Content) func() *answer {
	return p.asking("PUT", p.path("manifests", ref), manifest.Data, "Content-Type", manifest.MediaType)
}

// whole checks that what is listed is there, and that what is there is whole.
func (p pusher) whole(images ...regtest.Image) {
	p.t.Helper()
	tags, _ := p.tags("")
	for _, tag := range tags {
		a := p.sends(200, "GET", p.path("manifests", tag), nil)
		i := slices.IndexFunc(images, func(image regtest.Image) bool {
			return image.Digest.String() == a.Header.Get("Docker-Content-Digest")
		})
		if i < 0 {
			p.t.Fatalf("%s means %s", tag, a.Header.Get("Docker-Content-Digest"))
		}
		p.pull(p.repository, tag, images[i])
	}
	for _, image := range images {
		if a, err := p.try("GET", p.path("manifests", image.Digest.String()), nil); err != nil || a.StatusCode == 200 {
			p.pull(p.repository, image.Digest.String(), image)
		}
	}
}

// TestTwoPushersOfOneTag: one wins, whole, wherever the other is just then.
func TestTwoPushersOfOneTag(t *testing.T) {
	m := start(t, "", hostedSite)
	for i, at := range []string{"manifest.stored", "manifest.linked", "manifest.synced", "push.tag", "tag.indexed", "tag.linked", "tag.synced"} {
		p := pusher{m, fmt.Sprint("apps/r", i)}
		var images []regtest.Image
		for _, name := range []string{"x", "y", "z"} {
			image := regtest.NewImage(name, regtest.Random(name, 100))
			p.image(image)
			images = append(images, image)
		}
		for _, a := range m.meanwhile(at, p.pushing("v1", images[0].Content), p.pushing("v1", images[1].Content), p.pushing("v1", images[2].Content)) {
			if a.StatusCode != 201 {
				t.Errorf("%s: status %d: %s", at, a.StatusCode, a.body)
			}
		}
		if tags, _ := p.tags(""); !slices.Equal(tags, []string{"v1"}) {
			t.Errorf("%s: tags %q", at, tags)
		}
		p.whole(images...)
	}
}

// TestPushersOfOneTag is the same in a crowd.
func TestPushersOfOneTag(t *testing.T) {
	m := start(t, "", hostedSite)
	p := pusher{m, "apps/web"}
	var images []regtest.Image
	for i := range 8 {
		image := regtest.NewImage(fmt.Sprint(i))
		p.blob(image.Blobs[0].Data)
		images = append(images, image)
	}
	var wg sync.WaitGroup
	for _, image := range images {
		wg.Go(func() {
			for i := range 10 {
				if a := p.pushing("v1", image.Content)(); a.Response == nil || a.StatusCode != 201 {
					t.Errorf("%+v", a)
				}
				if i%3 == 0 {
					if a := p.asking("GET", p.path("manifests", "v1"), nil)(); a.Response == nil || a.StatusCode != 200 {
						t.Errorf("%+v", a)
					}
				}
			}
		})
	}
	wg.Wait()
	if tags, _ := p.tags(""); !slices.Equal(tags, []string{"v1"}) {
		t.Errorf("tags %q", tags)
	}
	p.whole(images...)
}

// TestPushAgainstDelete: a push that meets a deletion of the same, at any step of
// either, has come before it or after it.
func TestPushAgainstDelete(t *testing.T) {
	m := start(t, "", hostedSite)
	n := 0
	fresh := func(tags ...string) (pusher, regtest.Image) {
		n++
		p, image := pusher{m, fmt.Sprint("apps/r", n)}, regtest.NewImage("x", regtest.Random("x", 100))
		p.image(image, tags...)
		return p, image
	}
	okay := func(at string, p pusher, image regtest.Image, put, del *answer) {
		t.Helper()
		if put.StatusCode != 201 || del.StatusCode != 202 && del.StatusCode != 404 {
			t.Errorf("%s: push %d %s, delete %d %s", at, put.StatusCode, put.body, del.StatusCode, del.body)
		}
		p.whole(image)
	}
	for _, at := range []string{"manifest.stored", "manifest.linked", "manifest.synced", "push.tag", "tag.indexed", "tag.linked", "tag.synced"} {
		p, image := fresh("old")
		answers := m.meanwhile(at, p.pushing("new", image.Content), p.asking("DELETE", p.path("manifests", image.Digest.String()), nil))
		okay(at, p, image, answers[0], answers[1])
	}
	for _, at := range []string{"evict.untagged", "evict.unindexed", "delete.untagged", "evict.unmanifested", "delete.synced"} {
		p, image := fresh("old")
		answers := m.meanwhile(at, p.asking("DELETE", p.path("manifests", image.Digest.String()), nil), p.pushing("new", image.Content))
		okay(at, p, image, answers[1], answers[0])
	}
	for _, at := range []string{"evict.untagged", "evict.unindexed", "delete.synced"} {
		p, image := fresh("v1")
		answers := m.meanwhile(at, p.asking("DELETE", p.path("manifests", "v1"), nil), p.pushing("v1", image.Content))
		okay(at, p, image, answers[1], answers[0])
	}
}

// TestPushAgainstDeleteOfABlob: a manifest is taken in with all of its blobs, or
// not at all, though one of them is being deleted.
func TestPushAgainstDeleteOfABlob(t *testing.T) {
	m := start(t, "", hostedSite)
	for i, c := range []struct {
		at     string
		delete bool // is what stops
	}{
		{"evict.unlinked", true}, {"delete.synced", true},
		{"manifest.stored", false}, {"manifest.linked", false}, {"manifest.synced", false}, {"push.tag", false}, {"tag.synced", false},
	} {
		p, image := pusher{m, fmt.Sprint("apps/r", i)}, regtest.NewImage("x", regtest.Random("x", 100))
		for _, blob := range image.Blobs {
			p.blob(blob.Data)
		}
		del := p.asking("DELETE", p.path("blobs", image.Blobs[1].Digest.String()), nil)
		put := p.pushing("v1", image.Content)
		var deleted, pushed *answer
		if c.delete {
			answers := m.meanwhile(c.at, del, put)
			deleted, pushed = answers[0], answers[1]
		} else {
			answers := m.meanwhile(c.at, put, del)
			deleted, pushed = answers[1], answers[0]
		}
		switch {
		case deleted.StatusCode == 202 && pushed.StatusCode == 404:
			m.refused(404, oci.CodeManifestBlobUnknown, "PUT", p.path("manifests", "v1"), image.Data, "", "Content-Type", image.MediaType)
			if tags, _ := p.tags(""); len(tags) != 0 {
				t.Errorf("%s: tags %q", c.at, tags)
			}
		case deleted.StatusCode == 405 && pushed.StatusCode == 201:
			p.pull(p.repository, "v1", image)
		default:
			t.Errorf("%s: delete %d %s, push %d %s", c.at, deleted.StatusCode, deleted.body, pushed.StatusCode, pushed.body)
		}
	}
}

// TestReferrersAreListedAtOnce: who asks after a push or a deletion was answered
// hears of it, though others have asked all the time.
func TestReferrersAreListedAtOnce(t *testing.T) {
	m := start(t, "", hostedSite)
	p := pusher{m, "apps/web"}
	subject := regtest.NewImage("x")
	p.image(subject, "v1")
	descriptor := subject.Descriptor()
	path := p.path("referrers", subject.Digest.String())
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
					if a := p.asking("GET", path, nil)(); a.Response == nil || a.StatusCode != 200 {
						t.Errorf("%+v", a)
						return
					}
				}
			}
		})
	}
	for i := range 20 {
		one := artifact(fmt.Sprint("application/vnd.", i), &descriptor, nil, regtest.Random("layer", 10))
		p.image(one)
		if found, _ := p.referrers(subject.Digest, ""); len(found) != 1 || found[0].Digest != one.Digest {
			t.Errorf("after push %d: %v", i, found)
		}
		p.sends(202, "DELETE", p.path("manifests", one.Digest.String()), nil)
		if found, _ := p.referrers(subject.Digest, ""); len(found) != 0 {
			t.Errorf("after deletion %d: %v", i, found)
		}
	}
	close(done)
	wg.Wait()
}
