package regtest

import (
	"io"
	"net/http"
	"testing"
	"time"
)

// TestWatch: what a client has seen the end of is in the log, and a blob comes
// no faster than it is paced.
func TestWatch(t *testing.T) {
	const latency = 20 * time.Millisecond
	r := New(t, Options{NoToken: true, NoRedirect: true, Rate: 1_000_000, Latency: latency})
	image := NewImage("x", Random("x", 100_000))
	layer := image.Blobs[1]
	r.Push("a/b", image)
	client := &http.Client{Transport: new(http.Transport)}
	defer client.CloseIdleConnections()
	for i, at := range []string{"bytes=0-49999", "bytes=50000-", ""} {
		req, err := http.NewRequest(http.MethodGet, r.URL+"/v2/a/b/blobs/"+layer.Digest.String(), nil)
		if err != nil {
			t.Fatal(err)
		}
		if at != "" {
			req.Header.Set("Range", at)
		}
		start := time.Now()
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if sent := r.SentByRange(layer.Digest); len(sent) != i+1 || sent[at] != n {
			t.Errorf("%q: %v is in the log, %d bytes came", at, sent, n)
		}
		// All but the last piece has had to wait.
		if took := time.Since(start); took < latency+time.Duration(float64(n-20_000)*float64(time.Microsecond)) {
			t.Errorf("%q: %d bytes in %v", at, n, took)
		}
	}
	if got := r.Connections("registry"); got != 1 {
		t.Errorf("%d connections", got)
	}
	if got := r.MostBlobs(); got != 1 {
		t.Errorf("%d blobs at once", got)
	}
	if got := r.Fetches(layer.Digest); len(got) != 3 || got[0].Range != "bytes=0-49999" || got[2].Status != http.StatusOK {
		t.Errorf("fetches: %+v", got)
	}
	r.Forget()
	if len(r.Fetches(layer.Digest)) != 0 || r.Connections("registry") != 0 || r.MostBlobs() != 0 {
		t.Error("not forgotten")
	}
}
