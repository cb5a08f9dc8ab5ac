package longhorn_test

import (
	"context"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/regtest"
	fake "github.com/caddy-registry/mirror/internal/regtest/longhorn"
)

func ask(t *testing.T, method, url, body string) (int, http.Header, string) {
	t.Helper()
	request, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("User-Agent", "test")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, response.Header, string(data)
}

// states polls an image until it is in a state, and returns those it was seen in.
func states(t *testing.T, m *fake.Manager, name, until string) (seen []string, last map[string]any) {
	t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for time.Now().Before(deadline) {
		_, _, body := ask(t, "GET", m.URL+"/v1/backingimages/"+name, "")
		last = nil
		if err := json.Unmarshal([]byte(body), &last); err != nil {
			t.Fatal(err, body)
		}
		state := "none"
		for _, f := range last["diskFileStatusMap"].(map[string]any) {
			state = f.(map[string]any)["state"].(string)
		}
		if len(seen) == 0 || seen[len(seen)-1] != state {
			seen = append(seen, state)
		}
		if state == until {
			return seen, last
		}
	}
	t.Fatalf("%s never became %s: %q", name, until, seen)
	return nil, nil
}

// source serves data by a handler on loopback, and dials every name to it.
func source(t *testing.T, h http.HandlerFunc) func(context.Context, string, string) (net.Conn, error) {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	return func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, server.Listener.Addr().String())
	}
}

func create(t *testing.T, m *fake.Manager, name, url, sum string) (int, string) {
	t.Helper()
	status, _, body := ask(t, "POST", m.URL+"/v1/backingimages",
		fmt.Sprintf(`{"name":%q,"sourceType":"download","parameters":{"url":%q},"expectedChecksum":%q,"unknown":1}`, name, url, sum))
	return status, body
}

// The answers are, byte for byte, those of Longhorn's own writer.
func TestGolden(t *testing.T) {
	data := regtest.Random("parrot", 20971520).Data
	m := fake.New(t, fake.Options{Dial: source(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(len(data)))
		w.Write(data)
	})})
	const url = "http://images.test/parrot.img"
	if status, body := create(t, m, "parrot", url, ""); status != 200 || !strings.Contains(body, `"uuid":""`) || !strings.Contains(body, `"diskFileStatusMap":{}`) {
		t.Fatal(status, body)
	}
	seen, last := states(t, m, "parrot", "ready")
	if fmt.Sprintf("%q", seen) != `["" "starting" "in-progress" "ready-for-transfer" "none" "ready"]` {
		t.Errorf("seen: %q", seen)
	}
	sum := sha512.Sum512(data)
	host := strings.TrimPrefix(m.URL, "http://")
	golden := func(file, got string) {
		t.Helper()
		want, err := os.ReadFile("testdata/" + file)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.NewReplacer("//H/", "//"+host+"/", "SUM", hex.EncodeToString(sum[:]), "URL", url, "UUID", last["uuid"].(string)).Replace(string(want))
		if got != text {
			t.Errorf("%s: got\n%swant\n%s", file, got, text)
		}
	}
	_, header, body := ask(t, "GET", m.URL+"/v1/backingimages/parrot", "")
	golden("backingimage.json", body)
	if header.Get("Content-Type") != "application/json" || header.Get("X-API-Schemas") == "" {
		t.Error(header)
	}
	status, header, body := ask(t, "GET", m.URL+"/v1/backingimages/macaw", "")
	golden("error.json", body)
	if status != 404 || !strings.HasPrefix(header.Get("Content-Type"), "text/plain") {
		t.Error(status, header)
	}
	m.Remove("parrot")
	if _, _, body = ask(t, "GET", m.URL+"/v1/backingimages", ""); body != `{"data":[],"links":{"self":"`+m.URL+`/v1/backingimages"},"resourceType":"backingImage","type":"collection"}`+"\n" {
		t.Error(body)
	}
}

// A server that is no perfect source fails as it does with the real downloader.
func TestDownloader(t *testing.T) {
	data := regtest.Random("x", 4096).Data
	whole := func(w http.ResponseWriter, d []byte) {
		w.Header().Set("Content-Length", strconv.Itoa(len(d)))
		w.Write(d)
	}
	for _, c := range []struct {
		name, sum, want string
		handler         http.HandlerFunc
	}{
		{"absent", "", "expected status code 200 from http://images.test/x.img, got 404 Not Found", http.NotFound},
		{"partial", "", "got 206", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(206) }},
		{"no HEAD", "", "got 405", func(w http.ResponseWriter, r *http.Request) {
			if r.Method == "HEAD" {
				w.WriteHeader(405)
			}
		}},
		{"checksum", strings.Repeat("ab", 64), "the expected checksum", func(w http.ResponseWriter, r *http.Request) { whole(w, data) }},
		{"short", "", "processed data size 4096 does not match the expected file size 5120", func(w http.ResponseWriter, r *http.Request) {
			if r.Method == "HEAD" {
				w.Header().Set("Content-Length", "5120")
				return
			}
			whole(w, data)
		}},
		{"silent", "", "context ", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "4096")
			if r.Method == "GET" {
				w.Write(data[:512])
				w.(http.Flusher).Flush()
				<-r.Context().Done()
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := fake.Options{Dial: source(t, c.handler), Second: time.Hour}
			if c.name == "silent" {
				o.Silence = 500 * time.Millisecond
			}
			m := fake.New(t, o)
			create(t, m, "x1", "http://images.test/x.img", c.sum)
			_, last := states(t, m, "x1", "failed")
			if text := fmt.Sprint(last["diskFileStatusMap"]); !strings.Contains(text, "failed to process sync file: ") || !strings.Contains(text, c.want) {
				t.Errorf("%s\nwant %s", text, c.want)
			}
			states(t, m, "x1", "failed-and-cleanup")
		})
	}
}

// A file that is no multiple of 512 is downloaded, and then never taken.
func TestUnaligned(t *testing.T) {
	data := regtest.Random("x", 4097).Data
	m := fake.New(t, fake.Options{Dial: source(t, func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, strings.NewReader(string(data)))
	})})
	create(t, m, "x1", "http://images.test/x.img", "")
	states(t, m, "x1", "ready-for-transfer")
	for range 20 {
		states(t, m, "x1", "")
	}
}

// What the webhooks make of an image, or say against it.
func TestRules(t *testing.T) {
	for _, c := range []struct {
		profile        fake.Profile
		name, url, sum string
		want           string
	}{
		{fake.V1_12_1, "x1", "http://127.0.0.1/x", "", "denied the request: invalid URL"},
		{fake.V1_12_1, "x1", "http://localhost/x", "", "denied the request: invalid URL"},
		{fake.V1_12_1, "x1", "http://0.0.0.0/x", "", "denied the request: invalid URL"},
		{fake.V1_12_1, "x1", "ftp://images.test/x", "", "denied the request: invalid URL"},
		{fake.V1_10, "x1", "http://127.0.0.1:1/x", "", `"name":"x1"`},
		{fake.V1_4, "X1", "http://127.0.0.1:1/x", "", `"name":"x1"`},
		{fake.V1_4, strings.Repeat("a", 50), "http://127.0.0.1:1/x", "", `"name":"` + strings.Repeat("a", 31) + "-"},
		{fake.V1_7, "x1", "http://127.0.0.1:1/x", "abc", "denied the request: invalid checksum abc"},
		{fake.V1_7, "-x", "http://127.0.0.1:1/x", "", "denied the request: invalid name -x"},
	} {
		m := fake.New(t, fake.Options{Profile: c.profile, Second: time.Hour})
		if _, body := create(t, m, c.name, c.url, c.sum); !strings.Contains(body, c.want) {
			t.Errorf("%+v: %s", c, body)
		}
	}
}
