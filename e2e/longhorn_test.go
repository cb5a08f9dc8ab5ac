//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/regtest"
	"github.com/caddy-registry/mirror/internal/regtest/longhorn"
)

// A gate lets bytes through until it has seen so many, then none until it opens.
type gate struct {
	left    atomic.Int64
	reached chan struct{}
	open    chan struct{}
	opened  atomic.Bool
}

func newGate(after int64) *gate {
	g := &gate{reached: make(chan struct{}), open: make(chan struct{})}
	g.left.Store(after)
	return g
}

// pass waits at the gate if it is reached; nil is returned when one may go on.
func (g *gate) pass(n int, gone <-chan struct{}) error {
	left := g.left.Add(-int64(n))
	if left > 0 {
		return nil
	}
	if left+int64(n) > 0 {
		close(g.reached)
	}
	select {
	case <-g.open:
		return nil
	case <-gone:
		return io.ErrUnexpectedEOF
	}
}

func (g *gate) release() {
	if g.opened.CompareAndSwap(false, true) {
		close(g.open)
	}
}

// gated is a connection, or a body, whose bytes pass a gate as they are read.
type gated struct {
	net.Conn
	g *gate
}

func (c gated) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err == nil {
		err = c.g.pass(n, nil)
	}
	return n, err
}

type gatedBody struct {
	io.ReadCloser
	ctx context.Context
	g   *gate
}

func (b gatedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err == nil {
		err = b.g.pass(n, b.ctx.Done())
	}
	return n, err
}

// registration is where v1 of an image stands with Longhorn.
func (b *backingImages) registration(t *testing.T, name string) backing.Registration {
	t.Helper()
	v, known := b.version(t, name, "v1")
	if !known || len(v.Registrations) != 1 {
		t.Fatalf("%s v1 is registered %+v", name, v.Registrations)
	}
	return v.Registrations[0]
}

// untilInLonghorn waits until Longhorn has v1 of an image. Registering again has Longhorn
// be asked at once.
func (b *backingImages) untilInLonghorn(t *testing.T, m *longhorn.Manager, name string, data []byte) backing.Registration {
	t.Helper()
	var r backing.Registration
	eventually(t, 2*time.Minute, name+" to be in Longhorn", func() bool {
		// Whoever looks at it takes an image of this Longhorn on.
		if resp, err := http.Get(m.URL + "/v1/backingimages"); err == nil {
			resp.Body.Close()
		}
		b.register(t, "bell", "upload")
		r = b.registration(t, name)
		return r.State == backing.InLonghorn
	})
	if got, _, sum, _ := m.Content(r.Name); sum != digestsOf(data).SHA512.Encoded() || !bytes.Equal(got, data) {
		t.Errorf("Longhorn has %d bytes of %s with the SHA-512 %.16s…", len(got), name, sum)
	}
	return r
}

func (b *backingImages) register(t *testing.T, name, mode string) backing.Registration {
	t.Helper()
	body := `{"mode":"` + mode + `"}`
	status, _, text, err := b.do(t.Context(), http.MethodPost, "/v1/backing-images/"+name+"/versions/v1/registrations", strings.NewReader(body), int64(len(body)), "Content-Type", "application/json")
	if err != nil || status != http.StatusAccepted {
		t.Fatalf("registering %s: %d %s %v", name, status, text, err)
	}
	var r backing.Registration
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	return r
}

// startWithLonghorn starts a server of which a Longhorn downloads through one gate, and
// which uploads to it through another.
func startWithLonghorn(t *testing.T, profile longhorn.Profile, down, up *gate) (*backingImages, *longhorn.Manager) {
	t.Helper()
	setup := backingSetup{addr: regtest.FreeAddress(t), admin: regtest.FreeAddress(t)}
	m := longhorn.New(t, longhorn.Options{Profile: profile, Silence: 2 * time.Minute, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		conn, err := d.DialContext(ctx, network, setup.addr)
		if err != nil {
			return nil, err
		}
		return gated{conn, down}, nil
	}})
	to, err := url.Parse(m.URL)
	if err != nil {
		t.Fatal(err)
	}
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(to)
		if r.In.URL.Query().Get("action") == "upload" {
			r.Out.Body = gatedBody{r.Out.Body, r.In.Context(), up}
		}
	}}
	listener, err := net.Listen("tcp", regtest.FreeAddress(t))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: proxy}
	go server.Serve(listener)
	t.Cleanup(func() {
		up.release()
		down.release()
		server.Close()
	})
	_, port, _ := strings.Cut(setup.addr, ":")
	setup.public = "http://images.test:" + port
	setup.images = "longhorn default http://" + listener.Addr().String()
	b := startBackingImages(t, setup)
	status, _, text, err := b.do(t.Context(), http.MethodPut, "/v1/backing-images/bell/content", bytes.NewReader(make([]byte, 512)), 512)
	if err != nil || status != http.StatusCreated {
		t.Fatalf("the bell: %d %s %v", status, text, err)
	}
	return b, m
}

// TestLonghornKill: whatever dies in the middle of a registration, by a download or by an
// upload, Longhorn has the image in the end, and one of it.
func TestLonghornKill(t *testing.T) {
	// More than sockets hold is yet to come.
	const size, half = 32 << 20, 4 << 20
	for _, profile := range []longhorn.Profile{longhorn.V1_4, longhorn.V1_12_1} {
		for _, mode := range []string{"download", "upload"} {
			t.Run(string(profile)+" "+mode, func(t *testing.T) {
				down, up := newGate(1<<40), newGate(1<<40)
				at := map[string]*gate{"download": down, "upload": up}[mode]
				at.left.Store(half)
				b, m := startWithLonghorn(t, profile, down, up)
				data := regtest.Random("longhorn", size).Data
				status, _, text, err := b.do(t.Context(), http.MethodPut, "/v1/backing-images/killed/content", bytes.NewReader(data), size)
				if err != nil || status != http.StatusCreated {
					t.Fatalf("%d %s %v", status, text, err)
				}
				first := b.register(t, "killed", mode)
				eventually(t, time.Minute, "half of it to be on its way", func() bool {
					if resp, err := http.Get(m.URL + "/v1/backingimages"); err == nil {
						resp.Body.Close()
					}
					b.register(t, "killed", mode)
					select {
					case <-at.reached:
						return true
					default:
						return false
					}
				})
				if _, _, _, complete := m.Content(first.Name); complete {
					t.Fatal("Longhorn has it already")
				}
				b.kill()
				at.release()
				b = b.restart(t)
				r := b.untilInLonghorn(t, m, "killed", data)
				if r.Name != first.Name || r.URL != first.URL || string(r.Mode) != mode {
					t.Errorf("%+v; was %+v", r, first)
				}
				begun := len(m.Fetches(r.Name)) / 2
				if mode == "upload" {
					begun = -1 // the bell's
					for _, request := range m.Requests("POST", "/v1/backingimages/") {
						if strings.Contains(request.Query, "action=upload") {
							begun++
						}
					}
				}
				if begun < 2 {
					t.Errorf("nothing was cut: it was begun %d times", begun)
				}
				names := m.Names()
				if len(names) > 2 || !strings.Contains(strings.Join(names, " "), r.Name) {
					t.Errorf("Longhorn has %q", names)
				}
				// And it can be taken back, by the command.
				run(t, bare(workDir(t)), caddyBin, "registry", "image", "rm", "killed:v1", "--unregister", "--url", "http://"+b.addr, "--token", backingToken)
				if names := m.Names(); strings.Contains(strings.Join(names, " "), r.Name) {
					t.Errorf("Longhorn still has %q", names)
				}
				if _, known := b.version(t, "killed", "v1"); known {
					t.Error("it is still here")
				}
			})
		}
	}
}
