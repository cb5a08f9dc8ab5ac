package upstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/fill"
	"github.com/caddy-registry/mirror/internal/regtest"
)

// open makes an upstream of registries, the last of which is the origin. The
// clock and the settings may be nil.
func open(t testing.TB, c *clock, set func(*Endpoint), registries ...*regtest.Registry) *Upstream {
	t.Helper()
	pool := new(Pool)
	if c != nil {
		pool.Now = c.now
	}
	var endpoints []Endpoint
	for i, r := range registries {
		e := Endpoint{
			URL: mustURL(t, r.URL), Origin: i == len(registries)-1, Pull: true, Resolve: true, AllowPrivate: true,
			Proxy: noProxy, Timeouts: Timeouts{time.Minute, time.Minute, time.Minute},
		}
		if set != nil {
			set(&e)
		}
		endpoints = append(endpoints, e)
	}
	u, err := pool.Open("reg.test", endpoints)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(u.Close)
	return u
}

// pushed is a registry with one layer of n bytes in a/b, and its only source.
func pushed(t testing.TB, c *clock, opts regtest.Options, n int) (*regtest.Registry, regtest.Content, fill.Source) {
	t.Helper()
	r := regtest.New(t, opts)
	image := regtest.NewImage("x", regtest.Random("x", n))
	r.Push("a/b", image)
	layer := image.Blobs[1]
	return r, layer, open(t, c, nil, r).Blob("a/b", layer.Digest)[0]
}

// fetch reads a span to its end.
func fetch(source fill.Source, offset, length int64) (*fill.Stream, []byte, error) {
	stream, err := source.Open(context.Background(), fill.Span{Offset: offset, Length: length})
	if err != nil {
		return nil, nil, err
	}
	defer stream.Close()
	data, err := io.ReadAll(stream)
	return stream, data, err
}

// wantSpan fetches a span and looks at what comes.
func wantSpan(t testing.TB, source fill.Source, data []byte, offset, length int64) {
	t.Helper()
	stream, got, err := fetch(source, offset, length)
	if err != nil {
		t.Errorf("%d bytes at %d: %v", length, offset, err)
		return
	}
	end := int64(len(data))
	if length >= 0 {
		end = min(end, offset+length)
	}
	if stream.Whole || stream.Offset != offset || stream.Size != int64(len(data)) || !bytes.Equal(got, data[offset:end]) {
		t.Errorf("%d bytes at %d: got %d at %d of %d (whole: %v), or the wrong ones", length, offset, len(got), stream.Offset, stream.Size, stream.Whole)
	}
}

// wantWhole fetches a span and wants all there is.
func wantWhole(t testing.TB, source fill.Source, data []byte, offset, length int64) {
	t.Helper()
	stream, got, err := fetch(source, offset, length)
	if err != nil {
		t.Errorf("%d bytes at %d: %v", length, offset, err)
	} else if !stream.Whole || stream.Offset != 0 || stream.Size != int64(len(data)) || !bytes.Equal(got, data) {
		t.Errorf("%d bytes at %d: got %d at %d of %d (whole: %v), or the wrong ones", length, offset, len(got), stream.Offset, stream.Size, stream.Whole)
	}
}

// asked is how many requests for blobs the registry and its CDN had.
func asked(r *regtest.Registry) (registry, cdn int) {
	for _, req := range r.Requests(func(req regtest.Request) bool {
		return strings.Contains(req.Path, "/blobs/") && (req.Server == "cdn" || req.Status != 401)
	}) {
		if req.Server == "cdn" {
			cdn++
		} else {
			registry++
		}
	}
	return registry, cdn
}

func wantAsked(t testing.TB, r *regtest.Registry, registry, cdn int) {
	t.Helper()
	if a, b := asked(r); a != registry || b != cdn {
		t.Errorf("the registry was asked %d times and the CDN %d times, want %d and %d", a, b, registry, cdn)
	}
	for _, req := range r.Requests(func(req regtest.Request) bool { return req.Server == "cdn" && req.Authorization != "" }) {
		t.Errorf("the CDN was given %q", req.Authorization)
	}
	r.Forget()
}

// TestSpans: ranges come over one connection, by one redirect.
func TestSpans(t *testing.T) {
	for _, opts := range []regtest.Options{{}, {NoRedirect: true}} {
		t.Run(fmt.Sprint("at the registry itself: ", opts.NoRedirect), func(t *testing.T) {
			r, layer, source := pushed(t, nil, opts, 1<<20)
			const spans = 16
			var ranges []string
			for i := range spans {
				from := int64(i) << 16
				wantSpan(t, source, layer.Data, from, 1<<16)
				ranges = append(ranges, fmt.Sprintf("bytes=%d-%d", from, from+1<<16-1))
			}
			sender := "cdn"
			if opts.NoRedirect {
				sender = "registry"
			}
			if n := r.Connections(sender); n != 1 {
				t.Errorf("%d connections", n)
			}
			if n := r.MostBlobs(); n != 1 {
				t.Errorf("%d requests at once", n)
			}
			sent := r.SentByRange(layer.Digest)
			for _, at := range ranges {
				if sent[at] != 1<<16 {
					t.Errorf("%s: %d bytes sent", at, sent[at])
				}
			}
			if opts.NoRedirect {
				wantAsked(t, r, spans, 0)
			} else {
				wantAsked(t, r, 1, spans)
			}

			wantSpan(t, source, layer.Data, 1<<20-100, 1000) // less is there
			wantSpan(t, source, layer.Data, 1000, -1)
			r.Forget()
			stream, got, err := fetch(source, 0, -1)
			if err != nil || !stream.Whole || !bytes.Equal(got, layer.Data) {
				t.Errorf("all of it: %d bytes, %v", len(got), err)
			}
			if sent := r.SentByRange(layer.Digest); len(sent) != 1 || sent[""] != 1<<20 {
				t.Errorf("all of it was asked for by %v", sent)
			}
		})
	}
}

// TestRedirectedRegistryConnection: a redirect leaves the connection usable.
func TestRedirectedRegistryConnection(t *testing.T) {
	r, layer, _ := pushed(t, nil, regtest.Options{NoToken: true}, 1000)
	body := strings.Repeat("see there ", 100)
	r.Push("a/c", regtest.NewImage("x", layer))
	u := open(t, nil, nil, r)
	r.Fail(regtest.Fault{Path: "/manifests/", Status: http.StatusTemporaryRedirect, Header: http.Header{"Location": {r.URL + "/v2/"}}, Body: body})
	e := u.endpoints[0].endpoint
	for range 3 {
		resp, err := e.do(t.Context(), call{method: http.MethodGet, repository: "a/b", what: "manifests/x", follow: true})
		if err != nil {
			t.Fatal(err)
		}
		drain(resp)
	}
	if n := r.Connections("registry"); n != 1 {
		t.Errorf("%d connections", n)
	}
}

func TestTargetLife(t *testing.T) {
	c := newClock()
	var life time.Duration
	opts := regtest.Options{NoToken: true, Target: func(u *url.URL) {
		if life > 0 {
			u.RawQuery += fmt.Sprintf("&Expires=%d", c.t.Add(life).Unix())
		}
	}}
	r, layer, source := pushed(t, c, opts, 1000)
	ask := func() { t.Helper(); wantSpan(t, source, layer.Data, 100, 100) }
	ask()
	ask()
	wantAsked(t, r, 1, 2)
	c.advance(targetLife)
	ask()
	wantAsked(t, r, 1, 1)

	c.advance(targetLife)
	life = 30 * time.Second
	ask()
	c.advance(19 * time.Second)
	ask()
	wantAsked(t, r, 1, 2)
	c.advance(time.Second)
	ask()
	wantAsked(t, r, 1, 1)

	c.advance(targetLife)
	life = targetMargin
	ask()
	ask()
	wantAsked(t, r, 2, 2)
}

// TestTargetFails: what a remembered address says is no verdict. The registry
// is asked again at once, and only once.
func TestTargetFails(t *testing.T) {
	for _, status := range []int{302, 400, 401, 403, 404, 416, 429, 500, 503} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			r, layer, source := pushed(t, nil, regtest.Options{}, 1000)
			wantSpan(t, source, layer.Data, 0, 100)
			wantAsked(t, r, 1, 1)
			r.Fail(regtest.Fault{Path: "/blobs/", Status: status, Header: http.Header{"Location": {"http://127.0.0.1:1/"}}, Count: 1})
			wantSpan(t, source, layer.Data, 100, 100)
			wantAsked(t, r, 1, 2)
			wantSpan(t, source, layer.Data, 200, 100)
			wantAsked(t, r, 0, 1)
		})
	}

	t.Run("for good", func(t *testing.T) {
		r, layer, source := pushed(t, nil, regtest.Options{}, 1000)
		wantSpan(t, source, layer.Data, 0, 100)
		r.Forget()
		r.Fail(regtest.Fault{Path: "/blobs/", Status: http.StatusForbidden})
		_, _, err := fetch(source, 100, 100)
		var failure *Error
		if !errors.As(err, &failure) || failure.Kind != Unavailable || failure.Status != http.StatusForbidden {
			t.Errorf("%v", err)
		}
		if strings.Contains(fmt.Sprint(err), "secret") {
			t.Errorf("%v tells a secret", err)
		}
		wantAsked(t, r, 1, 2)
		r.Heal() // and what failed is not remembered
		wantSpan(t, source, layer.Data, 100, 100)
		wantAsked(t, r, 1, 1)
	})

	t.Run("a wrong range", func(t *testing.T) {
		r, layer, source := pushed(t, nil, regtest.Options{}, 1000)
		wantSpan(t, source, layer.Data, 0, 100)
		r.Forget()
		r.Fail(regtest.Fault{Path: "/blobs/", Status: http.StatusPartialContent, Header: http.Header{"Content-Range": {"bytes 0-4/1000"}}, Body: "wrong", Count: 1})
		wantSpan(t, source, layer.Data, 100, 100)
		wantAsked(t, r, 1, 2)
	})

	t.Run("gone", func(t *testing.T) {
		// Its second answer leads elsewhere, since nobody listens at the first.
		first := true
		r, layer, _ := pushed(t, nil, regtest.Options{}, 1000)
		moving := regtest.New(t, regtest.Options{NoToken: true, Target: func(u *url.URL) {
			if first {
				u.Host = strings.TrimPrefix(r.CDNURL(), "http://")
			}
			first = false
		}})
		moving.Push("a/b", regtest.NewImage("x", layer))
		source := open(t, nil, nil, moving).Blob("a/b", layer.Digest)[0]
		wantSpan(t, source, layer.Data, 0, 100)
		r.Down()
		wantSpan(t, source, layer.Data, 100, 100)
		wantAsked(t, moving, 2, 1)
	})

	t.Run("cut", func(t *testing.T) {
		r, layer, source := pushed(t, nil, regtest.Options{}, 1000)
		wantSpan(t, source, layer.Data, 0, 100)
		r.Fail(regtest.Fault{Path: "/blobs/", Cut: 0.5, Count: 1})
		if _, _, err := fetch(source, 100, 100); err == nil {
			t.Fatal("a stream that is cut ends well")
		}
		r.Forget()
		wantSpan(t, source, layer.Data, 100, 100)
		wantAsked(t, r, 1, 1)
	})

	t.Run("wrong bytes", func(t *testing.T) {
		r, layer, source := pushed(t, nil, regtest.Options{}, 1000)
		wantSpan(t, source, layer.Data, 0, 100)
		source.Blame(fill.ErrDigest)
		r.Forget()
		wantSpan(t, source, layer.Data, 0, 100)
		wantAsked(t, r, 1, 1)
	})
}

// TestTargetGuarded: the guard looks at a remembered address each time, and
// nothing within the endpoint itself is remembered.
func TestTargetGuarded(t *testing.T) {
	r, layer, source := pushed(t, nil, regtest.Options{NoToken: true}, 1000)
	e := source.(blob).endpoint
	wantSpan(t, source, layer.Data, 0, 100)
	e.transports.guard.allowPrivate = false
	r.Forget()
	_, _, err := fetch(source, 100, 100)
	var failure *Error
	if !errors.As(err, &failure) || failure.Kind != Refused {
		t.Errorf("a private address: %v", err)
	}
	wantAsked(t, r, 1, 0)

	direct, layer, source := pushed(t, nil, regtest.Options{NoRedirect: true}, 1000)
	wantSpan(t, source, layer.Data, 0, 100)
	if n := source.(blob).endpoint.targets.cache.Len(); n != 0 {
		t.Errorf("%d addresses are remembered", n)
	}
	wantAsked(t, direct, 1, 0)
}

// TestTargetOfProbe: asking for the size spares the first span its redirect,
// and is itself always asked of the registry, since it proves something.
func TestTargetOfProbe(t *testing.T) {
	r, layer, _ := pushed(t, nil, regtest.Options{}, 1000)
	u := open(t, nil, nil, r)
	for range 2 {
		if size, err := u.BlobSize(t.Context(), "a/b", layer.Digest); size != 1000 || err != nil {
			t.Fatalf("%d bytes, %v", size, err)
		}
		wantAsked(t, r, 2, 1) // HEAD and GET
	}
	wantSpan(t, u.Blob("a/b", layer.Digest)[0], layer.Data, 0, 100)
	wantAsked(t, r, 0, 1)
}

func TestEmptyBlobSize(t *testing.T) {
	r := regtest.New(t, regtest.Options{})
	empty := regtest.Blob("application/octet-stream", nil)
	r.Push("a/b", regtest.NewImage("x", empty))
	// A CDN that takes no range of nothing.
	r.Fail(regtest.Fault{Path: empty.Digest.String(), Ranged: true, Status: 416, Header: http.Header{"Content-Range": {"bytes */0"}}})
	u := open(t, nil, nil, r)
	if size, err := u.BlobSize(t.Context(), "a/b", empty.Digest); size != 0 || err != nil {
		t.Errorf("%d bytes, %v", size, err)
	}
}

// TestNoRanges: who cannot deliver a range is asked for the whole.
func TestNoRanges(t *testing.T) {
	partial := func(at, body string) regtest.Fault {
		return regtest.Fault{Status: http.StatusPartialContent, Header: http.Header{"Content-Range": {at}}, Body: body}
	}
	multipart := partial("", "--x")
	multipart.Header = http.Header{"Content-Type": {"multipart/byteranges; boundary=x"}}
	for name, fault := range map[string]regtest.Fault{
		"400":                     {Status: http.StatusBadRequest},
		"416":                     {Status: http.StatusRequestedRangeNotSatisfiable},
		"416 with a size":         {Status: http.StatusRequestedRangeNotSatisfiable, Header: http.Header{"Content-Range": {"bytes */1000"}}},
		"501":                     {Status: http.StatusNotImplemented},
		"no Content-Range":        {Status: http.StatusPartialContent, Body: "five!"},
		"multipart":               multipart,
		"another place":           partial("bytes 500-504/1000", "five!"),
		"before it":               partial("bytes 0-4/1000", "five!"),
		"more than was asked for": partial("bytes 100-200/1000", strings.Repeat("x", 101)),
		"another length":          partial("bytes 100-104/1000", "six!!!"),
		"nonsense":                partial("bytes 100-104/50", "five!"),
	} {
		for _, direct := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, at the registry itself: %v", name, direct), func(t *testing.T) {
				r, layer, source := pushed(t, nil, regtest.Options{NoRedirect: direct}, 1000)
				fault.Path, fault.Ranged = "/blobs/", true
				r.Fail(fault)
				wantWhole(t, source, layer.Data, 100, 100)
				if direct {
					wantAsked(t, r, 2, 0)
				} else {
					wantAsked(t, r, 2, 2)
				}
				if _, err := open(t, nil, nil, r).BlobSize(t.Context(), "a/b", layer.Digest); err != nil {
					t.Errorf("its size: %v", err)
				}
			})
		}
	}

	t.Run("ignored", func(t *testing.T) {
		r, layer, source := pushed(t, nil, regtest.Options{IgnoreRange: true}, 1000)
		wantWhole(t, source, layer.Data, 100, 100)
		wantAsked(t, r, 1, 1)
	})
	t.Run("refused altogether", func(t *testing.T) {
		r, _, source := pushed(t, nil, regtest.Options{NoRedirect: true}, 1000)
		r.Fail(regtest.Fault{Path: "/blobs/", Status: http.StatusBadRequest})
		_, _, err := fetch(source, 100, 100)
		var failure *Error
		if !errors.As(err, &failure) || failure.Kind != Invalid || failure.Status != 400 {
			t.Errorf("%v", err)
		}
		wantAsked(t, r, 2, 0)
	})
	t.Run("impossible", func(t *testing.T) {
		for _, direct := range []bool{false, true} {
			r, _, source := pushed(t, nil, regtest.Options{NoRedirect: direct}, 1000)
			_, _, err := fetch(source, 1000, 100)
			var failure *Error
			if !errors.As(err, &failure) || failure.Kind != Invalid || failure.Status != 416 || !strings.Contains(err.Error(), "1000 bytes") {
				t.Errorf("%v", err)
			}
			if registry, _ := asked(r); registry != 1 {
				t.Errorf("asked %d times", registry)
			}
		}
	})
}

// TestUnaskedBytes: nothing is delivered beyond the range that was asked for.
func TestUnaskedBytes(t *testing.T) {
	chunked := http.NewServeMux()
	chunked.HandleFunc("/v2/a/b/blobs/", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Range", "bytes 100-199/1000")
		w.WriteHeader(http.StatusPartialContent)
		for range 5 { // without a Content-Length
			io.WriteString(w, strings.Repeat("x", 50))
			w.(http.Flusher).Flush()
		}
	})
	trap := newTrap(t, false)
	trap.Config.Handler = chunked
	u, err := new(Pool).Open("reg.test", []Endpoint{{URL: mustURL(t, trap.URL), Origin: true, Pull: true, Proxy: noProxy, Timeouts: Timeouts{time.Minute, time.Minute, time.Minute}}})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	for _, length := range []int64{100, -1} {
		stream, got, err := fetch(u.Blob("a/b", digest.FromString("x"))[0], 100, length)
		if err != nil || len(got) != 100 || stream.Offset != 100 || stream.Size != 1000 {
			t.Errorf("length %d: got %d bytes, %v", length, len(got), err)
		}
	}
}

// TestCap: an endpoint delivers four times as many streams as a blob has
// connections, no more, and only half of them to the background.
func TestCap(t *testing.T) {
	for _, connections := range []int{0, 1, 2} {
		t.Run(fmt.Sprint(connections), func(t *testing.T) {
			r := regtest.New(t, regtest.Options{NoToken: true})
			image := regtest.NewImage("x", regtest.Random("x", 1<<20))
			r.Push("a/b", image)
			source := open(t, nil, func(e *Endpoint) { e.Connections = connections }, r).Blob("a/b", image.Blobs[1].Digest)[0]
			limit := 4 * connections
			if connections == 0 {
				limit = 4 * DefaultConnections
			}
			var streams []*fill.Stream
			full := func(background bool) {
				t.Helper()
				ctx, cancel := context.WithCancel(t.Context())
				cancel() // and so does not wait
				if _, err := source.Open(ctx, fill.Span{Length: 100, Background: background}); err != context.Canceled {
					t.Errorf("stream %d of %d (background: %v): %v", len(streams)+1, limit, background, err)
				}
			}
			for i := range limit {
				stream, err := source.Open(t.Context(), fill.Span{Length: 100, Background: i < limit/2})
				if err != nil {
					t.Fatalf("stream %d of %d: %v", i+1, limit, err)
				}
				if streams = append(streams, stream); i >= limit/2-1 {
					full(true)
				}
			}
			full(false)
			for _, stream := range streams {
				stream.Close()
				stream.Close()
			}
			if p := source.(blob).endpoint.places; p.taken != 0 || p.background != 0 {
				t.Errorf("in the end %d places are taken, %d by the background", p.taken, p.background)
			}
		})
	}
}

// TestParallelSpans: all the connections of a blob are kept for its next
// spans.
func TestParallelSpans(t *testing.T) {
	r, layer, source := pushed(t, nil, regtest.Options{NoToken: true}, 1<<20)
	wantSpan(t, source, layer.Data, 0, 100)
	const connections = 4 * DefaultConnections
	for range 3 {
		begun := make(chan struct{})
		var all, first sync.WaitGroup
		first.Add(connections)
		for i := range connections {
			all.Go(func() {
				stream, err := source.Open(t.Context(), fill.Span{Offset: int64(i) << 16, Length: 1 << 16})
				first.Done()
				if err != nil {
					t.Error(err)
					return
				}
				<-begun // so that none is done before all have begun
				got, err := io.ReadAll(stream)
				if err != nil || !bytes.Equal(got, layer.Data[i<<16:(i+1)<<16]) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
				stream.Close()
			})
		}
		first.Wait()
		close(begun)
		all.Wait()
	}
	if n := r.Connections("cdn"); n != connections {
		t.Errorf("%d connections for %d spans at once", n, connections)
	}
}

// TestLastSource: who is the last is a matter of who can deliver.
func TestLastSource(t *testing.T) {
	r := regtest.New(t, regtest.Options{})
	n := 0
	u := open(t, nil, func(e *Endpoint) {
		n++
		e.Origin, e.Pull = false, n < 3
	}, r, r, r)
	sources := u.Blob("a/b", digest.FromString("x"))
	if len(sources) != 2 || sources[0].(blob).last || !sources[1].(blob).last {
		t.Errorf("%+v", sources)
	}
}

// TestNoPlace: who waits for a stream turns elsewhere after a while; what is
// asked for in the background waits on.
func TestNoPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := mustURL(t, "http://127.0.0.1:1")
		u, err := new(Pool).Open("reg.test", []Endpoint{{URL: base, Pull: true}, {URL: base, Pull: true, Origin: true}})
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		source := u.Blob("a/b", digest.FromString("x"))[0]
		places := source.(blob).endpoint.places
		for range places.limit {
			if _, err := places.take(t.Context(), false, nil); err != nil {
				t.Fatal(err)
			}
		}
		start := time.Now()
		_, err = source.Open(t.Context(), fill.Span{Length: 1})
		var failure *Error
		if !errors.As(err, &failure) || failure.Kind != Unavailable || failure.Upstream != "reg.test" || time.Since(start) != hurry {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		start = time.Now()
		if _, err = source.Open(ctx, fill.Span{Length: 1, Background: true}); err != context.DeadlineExceeded || time.Since(start) != time.Hour {
			t.Errorf("in the background, after %v: %v", time.Since(start), err)
		}
	})
}

// TestTargetSilent: an address that does not answer is forgotten, unless it is
// the caller who left.
func TestTargetSilent(t *testing.T) {
	r, layer, source := pushed(t, nil, regtest.Options{NoToken: true}, 1000)
	wantSpan(t, source, layer.Data, 0, 100)
	r.Forget()
	for _, c := range []struct {
		cause   error
		forgets bool
	}{{errors.New("the caller left"), false}, {ErrSlow, true}} {
		ctx, cancel := context.WithTimeoutCause(t.Context(), 20*time.Millisecond, c.cause)
		until := make(chan struct{})
		r.FailSlowly("", "/blobs/", until)
		_, err := source.Open(ctx, fill.Span{Offset: 100, Length: 100})
		if !errors.Is(err, c.cause) {
			t.Errorf("%v", err)
		}
		cancel()
		close(until)
		r.Heal()
		wantSpan(t, source, layer.Data, 100, 100)
		registry, _ := asked(r)
		if (registry > 0) != c.forgets {
			t.Errorf("%v: the registry was asked %d times", c.cause, registry)
		}
		r.Forget()
	}
}

// TestProbeCut: the place that a registry redirects the question for a size to
// breaks off its answer.
func TestProbeCut(t *testing.T) {
	cdn := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Range", "bytes 0-0/1000")
		w.Header().Set("Content-Length", "1")
		w.WriteHeader(http.StatusPartialContent)
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}))
	defer cdn.Close()
	registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, cdn.URL, http.StatusTemporaryRedirect)
	}))
	defer registry.Close()
	base, err := url.Parse(registry.URL)
	if err != nil {
		t.Fatal(err)
	}
	var pool Pool
	u, err := pool.Open("cut.test", []Endpoint{{URL: base, Origin: true, Pull: true, Resolve: true, AllowPrivate: true}})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	size, err := u.BlobSize(t.Context(), "a/b", digest.FromString("x"))
	if err != nil && !errors.As(err, new(*Error)) || err == nil && size != 1000 {
		t.Errorf("%d, %v", size, err)
	}
}
