package content

import (
	"io"
	"net/http"
	"strings"
)

// incoming is the body of a request. It knows whether it has been read to its
// end.
type incoming struct {
	io.ReadCloser
	ended bool
}

// Incoming wraps the body of a request, for [Hasten].
func Incoming(body io.ReadCloser) io.ReadCloser { return &incoming{ReadCloser: body} }

func (b *incoming) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.ended = b.ended || err != nil
	return n, err
}

// drained is how much of a body net/http reads before it answers, for the
// connection to be of use again.
const drained = 256 << 10

// Hasten has the answer sent at once to a client that may wait for it before it
// sends its body, or has much of it left to send. net/http would read some of the
// body before, which is not to come; it does not know such a client where the body
// has been wrapped, as Caddy does. The connection ends with the answer. The body is
// one of [Incoming], or counts as not read.
func Hasten(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor != 1 || r.ContentLength == 0 {
		return
	}
	if b, ok := r.Body.(*incoming); ok && b.ended {
		return
	}
	if r.ContentLength < 0 || r.ContentLength > drained || r.Header["Expect"] != nil {
		w.Header().Set("Connection", "close")
		linger(w)
	}
}

// linger lets net/http end its side of the connection after the answer, and only half
// a second later the whole: with the end of a connection on which bytes come that
// nobody reads, a client that is sending them may lose the answer. net/http does so
// by itself where it sees its own body that was not read to the end, and no other
// one's; and for those who have met a limit, which is how it is told here.
func linger(w http.ResponseWriter) {
	for {
		wrapped, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			break
		}
		w = wrapped.Unwrap()
	}
	http.MaxBytesReader(w, io.NopCloser(strings.NewReader("x")), 0).Read(make([]byte, 1))
}
