package mirror

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

func (b *incoming) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.ended = b.ended || err != nil
	return n, err
}

// drained is how much of a body net/http reads before it answers, for the
// connection to be of use again.
const drained = 256 << 10

// hasten has the answer sent at once to a client that may wait for it before it
// sends its body, or has much of it left to send. net/http would read some of the
// body before, which is not to come; it does not know such a client where the body
// has been wrapped, as Caddy does. The connection ends with the answer.
func (x *exchange) hasten() {
	if x.r.ProtoMajor != 1 || x.r.ContentLength == 0 {
		return
	}
	if b, ok := x.r.Body.(*incoming); ok && b.ended {
		return
	}
	if x.r.ContentLength < 0 || x.r.ContentLength > drained || x.r.Header["Expect"] != nil {
		x.w.Header().Set("Connection", "close")
		linger(x.w)
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

// listens reports whether the client may still read an answer. The context of a
// request ends when its body breaks off, and whoever has sent only half of one and
// hears nothing would take it for success.
func (x *exchange) listens() bool {
	return x.r.Context().Err() == nil || x.r.Method != http.MethodGet && x.r.Method != http.MethodHead
}
