package module_test

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/oci"
	"github.com/caddy-registry/mirror/internal/regtest"
)

const octets = "application/octet-stream"

// begin begins an upload, and returns its Location.
func (p pusher) begin(query string) string {
	p.t.Helper()
	a := p.sends(202, "POST", p.path("blobs", "uploads", "")+query, nil)
	return p.located(a)
}

// located is the Location of an upload, as containerd takes it: absolute, or from
// the root on.
func (p pusher) located(a *answer) string {
	p.t.Helper()
	to := a.Header.Get("Location")
	if !strings.HasPrefix(to, p.path("blobs", "uploads", "")) && !strings.HasPrefix(to, p.URL+p.path("blobs", "uploads", "")) || a.Header.Get("Docker-Upload-UUID") == "" {
		p.t.Fatalf("Location %q, %v", to, a.Header)
	}
	return to
}

// patch sends a chunk, or with from < 0 a stream, and returns the next Location.
func (p pusher) patch(to string, from int, data []byte) string {
	p.t.Helper()
	header := []string{"Content-Type", octets}
	if from >= 0 {
		header = append(header, "Content-Range", fmt.Sprint(from, "-", from+len(data)-1))
	}
	a := p.sends(202, "PATCH", to, data, header...)
	if want := fmt.Sprint("0-", max(from, 0)+len(data)-1); a.Header.Get("Range") != want {
		p.t.Errorf("Range %q after a chunk, want %s", a.Header.Get("Range"), want)
	}
	return p.located(a)
}

// finish ends an upload, perhaps with the last bytes.
func (p pusher) finish(to string, d digest.Digest, data []byte, header ...string) *answer {
	p.t.Helper()
	return p.sends(201, "PUT", withQuery(to, "digest", d.String()), data, append(header, "Content-Type", octets)...)
}

// stored checks the answer to a push, and that the blob is there.
func (p pusher) stored(a *answer, d digest.Digest, data []byte) {
	p.t.Helper()
	if got, want := a.Header.Get("Location"), p.path("blobs", d.String()); strings.TrimPrefix(got, p.URL) != want || a.Header.Get("Docker-Content-Digest") != d.String() {
		p.t.Errorf("%v, want the Location %s", a.Header, want)
	}
	for _, method := range []string{"HEAD", "GET"} {
		got := p.sends(200, method, a.Header.Get("Location"), nil)
		if method == "HEAD" {
			got.body = data
		}
		if err := check(got, regtest.Content{MediaType: octets, Digest: d, Data: data}); err != nil {
			p.t.Errorf("%s: %v", method, err)
		}
	}
}

// gone deletes a blob, and checks that it is not there from then on.
func (p pusher) gone(d digest.Digest) {
	p.t.Helper()
	path := p.path("blobs", d.String())
	p.sends(202, "DELETE", path, nil)
	for _, method := range []string{"HEAD", "GET", "DELETE"} {
		p.sends(404, method, path, nil)
	}
}

// TestProtocolBlobs: every way to push a blob, by both algorithms, with bytes that
// are right and bytes that are wrong.
func TestProtocolBlobs(t *testing.T) {
	m := start(t, "", hostedSite)
	p, other := pusher{m, "apps/web"}, pusher{m, "apps/other"}
	type push func(d digest.Digest, data []byte, want int) *answer
	end := func(to string, d digest.Digest, data []byte, want int, header ...string) *answer {
		return p.sends(want, "PUT", withQuery(to, "digest", d.String()), data, append(header, "Content-Type", octets)...)
	}
	ways := map[string]push{
		"post only": func(d digest.Digest, data []byte, want int) *answer {
			return p.sends(want, "POST", p.path("blobs", "uploads", "")+"?digest="+d.String(), data, "Content-Type", octets)
		},
		"post and put": func(d digest.Digest, data []byte, want int) *answer {
			return end(p.begin(""), d, data, want)
		},
		"with the algorithm": func(d digest.Digest, data []byte, want int) *answer {
			return end(p.begin("?digest-algorithm="+d.Algorithm().String()), d, data, want)
		},
		"streamed": func(d digest.Digest, data []byte, want int) *answer {
			return end(p.patch(p.begin(""), -1, data), d, nil, want)
		},
		"one chunk": func(d digest.Digest, data []byte, want int) *answer {
			return end(p.patch(p.begin(""), 0, data), d, nil, want)
		},
		"three chunks": func(d digest.Digest, data []byte, want int) *answer {
			to := p.patch(p.begin(""), 0, data[:200])
			to = p.patch(to, 200, data[200:400])
			return end(p.patch(to, 400, data[400:]), d, nil, want)
		},
		"the last chunk put": func(d digest.Digest, data []byte, want int) *answer {
			to := p.patch(p.begin(""), 0, data[:200])
			to = p.patch(to, 200, data[200:400])
			return end(to, d, data[400:], want, "Content-Range", fmt.Sprint("400-", len(data)-1))
		},
		"after chunks out of order": func(d digest.Digest, data []byte, want int) *answer {
			first := p.begin("")
			early := func(to string, from, end int) {
				t.Helper()
				a := m.refused(416, oci.CodeBlobUploadInvalid, "PATCH", to, data[from:end], "", "Content-Type", octets, "Content-Range", fmt.Sprint(from, "-", end-1))
				p.located(a)
			}
			early(first, 200, 400)
			to := p.patch(first, 0, data[:200])
			early(to, 0, 200)   // the same again
			early(to, 199, 400) // that overlaps
			early(to, 201, 400) // that leaves one out
			// A PUT with a chunk that is out of order neither.
			m.refused(416, oci.CodeBlobUploadInvalid, "PUT", withQuery(to, "digest", d.String()), data[400:], "", "Content-Type", octets, "Content-Range", fmt.Sprint("400-", len(data)-1))
			// The first Location still tells where it ends.
			a := p.sends(204, "GET", first, nil)
			if got := a.Header.Get("Range"); got != "0-199" {
				t.Errorf("Range %q", got)
			}
			to = p.patch(p.located(a), 200, data[200:400])
			return end(to, d, data[400:], want, "Content-Range", fmt.Sprint("400-", len(data)-1))
		},
	}
	for name, way := range ways {
		for _, algorithm := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
			t.Run(fmt.Sprint(name, " ", algorithm), func(t *testing.T) {
				m.t = t
				data := regtest.Random(fmt.Sprint(name, algorithm), 555).Data
				d := algorithm.FromBytes(data)
				m.sends(404, "GET", p.path("blobs", d.String()), nil)
				wrong := append(bytes.Clone(data), "oh no"...)
				way(d, wrong, 400)
				for _, d := range []digest.Digest{d, digest.FromBytes(wrong), algorithm.FromBytes(wrong)} {
					m.sends(404, "HEAD", p.path("blobs", d.String()), nil)
				}
				p.stored(way(d, data, 201), d, data)
				p.stored(way(d, data, 201), d, data) // and once more
				other.sends(404, "HEAD", other.path("blobs", d.String()), nil)
				p.gone(d)
				m.sends(404, "HEAD", p.path("blobs", digest.FromBytes(data).String()), nil)
			})
		}
	}
	m.t = t
	for _, data := range []string{"", "{}"} {
		for _, algorithm := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
			d := algorithm.FromBytes([]byte(data))
			p.stored(p.finish(p.begin(""), d, []byte(data)), d, []byte(data))
			p.gone(d)
			p.stored(ways["post only"](d, []byte(data), 201), d, []byte(data))
			p.gone(d)
		}
	}
}

// TestProtocolUploadErrors: what is wrong of an upload, and that it survives it.
func TestProtocolUploadErrors(t *testing.T) {
	m := start(t, "", hostedSite)
	p := pusher{m, "apps/web"}
	data := regtest.Random("x", 1000).Data
	d := digest.FromBytes(data)
	for query, status := range map[string]int{
		"?digest=sha256:bad":                            400,
		"?digest=md5:" + strings.Repeat("a", 32):        400,
		"?digest=latest":                                400,
		"?digest-algorithm=md5":                         400,
		"?digest-algorithm=sha256%0a":                   400,
		"?mount=sha256:bad&from=apps/other":             202, // what cannot be mounted is uploaded
		"?mount=" + d.String():                          202,
		"?mount=" + d.String() + "&from=apps/other":     202,
		"?mount=" + d.String() + "&from=apps/web":       202,
		"?mount=" + d.String() + "&from=../../etc":      202,
		"?mount=" + d.String() + "&from=docker.io/none": 202,
	} {
		m.sends(status, "POST", p.path("blobs", "uploads", "")+query, nil)
	}
	to := p.begin("")
	if a := p.sends(204, "GET", to, nil); a.Header.Get("Range") != "0-0" {
		t.Errorf("Range %q of nothing", a.Header.Get("Range"))
	}
	p.sends(204, "HEAD", to, nil)
	for _, header := range []string{"bytes 0-999/1000", "0-", "-999", "0-999/1000", "x-y", "0 - 999", "999-0", "0-99999999999999999999", "0-9", "00000000000-999x"} {
		a := p.sends(400, "PATCH", to, data, "Content-Type", octets, "Content-Range", header)
		if !bytes.Contains(a.body, []byte(`"code"`)) {
			t.Errorf("%s: %s", header, a.body)
		}
	}
	p.sends(400, "PUT", to, data)                            // no digest
	p.sends(400, "PUT", withQuery(to, "digest", "x:y"), nil) // none that is one
	to = p.patch(to, 0, data[:600])
	if a := p.sends(204, "GET", to, nil); a.Header.Get("Range") != "0-599" {
		t.Errorf("Range %q", a.Header.Get("Range"))
	}
	// Another repository does not have it.
	for _, method := range []string{"GET", "PATCH", "PUT", "DELETE"} {
		m.refused(404, oci.CodeBlobUploadUnknown, method, withQuery(strings.Replace(to, "apps/web", "apps/other", 1), "digest", d.String()), nil, "")
	}
	p.stored(p.finish(to, d, data[600:], "Content-Range", "600-999"), d, data)
	// It is over.
	for _, method := range []string{"GET", "PATCH", "PUT", "DELETE"} {
		m.refused(404, oci.CodeBlobUploadUnknown, method, withQuery(to, "digest", d.String()), nil, "")
	}
	to = p.patch(p.begin(""), 0, data[:10])
	p.sends(204, "DELETE", to, nil)
	for _, method := range []string{"GET", "PATCH", "PUT", "DELETE"} {
		m.refused(404, oci.CodeBlobUploadUnknown, method, withQuery(to, "digest", d.String()), nil, "")
	}
	for _, id := range []string{"x", "%2e%2e%2fdata", strings.Repeat("a", 32), "00000000-0000-0000-0000-000000000000"} {
		a, err := m.try("GET", p.path("blobs", "uploads", id), nil)
		if err != nil || a.StatusCode != 404 {
			t.Errorf("an upload %s: %v, %v", id, a, err)
		}
	}
}

// TestProtocolMounts: a blob comes from another repository, named or not, and
// only from where it is.
func TestProtocolMounts(t *testing.T) {
	m := startAdmin(t, "", hostedSite)
	p, from := pusher{m, "apps/web"}, pusher{m, "apps/other"}
	for _, algorithm := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
		for i, query := range []string{"&from=apps/other", ""} {
			data := regtest.Random(fmt.Sprint(algorithm, i), 512).Data
			d := algorithm.FromBytes(data)
			from.blobAs(d, data)
			if query == "" {
				m.complete() // it is the catalog that knows who has a blob
			}
			a := p.sends(201, "POST", p.path("blobs", "uploads", "")+"?mount="+d.String()+query, nil)
			p.stored(a, d, data)
			p.gone(d)
			from.sends(200, "HEAD", from.path("blobs", d.String()), nil)
			from.gone(d)
			to := p.located(p.sends(202, "POST", p.path("blobs", "uploads", "")+"?mount="+d.String()+query, nil))
			p.stored(p.finish(to, d, data), d, data)
		}
	}
}

// TestProtocolRanges: parts of a blob.
func TestProtocolRanges(t *testing.T) {
	m := start(t, "", hostedSite)
	p := pusher{m, "apps/web"}
	for _, size := range []int{2048, 2 << 20} { // from memory, and from a file
		data := regtest.Random(fmt.Sprint(size), size).Data
		for _, d := range []digest.Digest{digest.FromBytes(data), digest.SHA512.FromBytes(data)} {
			p.blobAs(d, data)
			path := p.path("blobs", d.String())
			for _, c := range []struct {
				ask      string
				from, to int // to < 0: not satisfiable
			}{
				{"500-1499", 500, 1499}, {"500-", 500, size - 1}, {"-500", size - 500, size - 1}, {"0-0", 0, 0}, {"0-", 0, size - 1},
				{"2000-" + strconv.Itoa(size+5000), 2000, size - 1}, {"-" + strconv.Itoa(size+1), 0, size - 1}, {strconv.Itoa(size-1) + "-", size - 1, size - 1},
				{"500-0", 0, -1}, {strconv.Itoa(size) + "-", 0, -1}, {strconv.Itoa(size+1) + "-" + strconv.Itoa(size+9), 0, -1}, {"-0", 0, -1},
			} {
				if c.to < 0 {
					a := m.refused(416, oci.CodeRangeInvalid, "GET", path, nil, "", "Range", "bytes="+c.ask)
					if got := a.Header.Get("Content-Range"); got != fmt.Sprint("bytes */", size) {
						t.Errorf("%s: Content-Range %q", c.ask, got)
					}
					continue
				}
				a := p.sends(206, "GET", path, nil, "Range", "bytes="+c.ask)
				if got := a.Header.Get("Content-Range"); got != fmt.Sprint("bytes ", c.from, "-", c.to, "/", size) || a.ContentLength != int64(c.to-c.from+1) || !bytes.Equal(a.body, data[c.from:c.to+1]) ||
					a.Header.Get("Docker-Content-Digest") != d.String() {
					t.Errorf("%s of %d: %d bytes, %v", c.ask, size, len(a.body), a.Header)
				}
			}
		}
	}
}
