package s3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-registry/mirror/storage"
)

// scripted is a bucket whose server is a function, for tests inside a bubble: no time
// passes there but that of the bucket's own waits.
func scripted(t *testing.T, answer func(n int, r *http.Request) (*http.Response, error)) *bucket {
	t.Helper()
	n := 0
	b, err := newBucket(context.Background(), settings{
		Endpoint: "https://s3.test", Bucket: "bucket", PathStyle: true, AccessKey: "thekey", SecretKey: "thesecret",
		PutLimit: 64 << 20, PartSize: 16 << 20, MaxParts: 10_000,
		transport: roundTripper(func(r *http.Request) (*http.Response, error) {
			n++
			if r.Body != nil {
				defer r.Body.Close()
			}
			return answer(n, r)
		}),
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// says is an answer with a body, and headers by turns with their values.
func says(r *http.Request, status int, body string, headers ...string) (*http.Response, error) {
	resp := &http.Response{
		StatusCode: status, ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{}, Request: r,
		Body: io.NopCloser(strings.NewReader(body)), ContentLength: int64(len(body)),
	}
	resp.Header.Set("Content-Length", strconv.Itoa(len(body)))
	for i := 0; i < len(headers); i += 2 {
		resp.Header.Set(headers[i], headers[i+1])
	}
	return resp, nil
}

func sayError(r *http.Request, status int, code string, headers ...string) (*http.Response, error) {
	return says(r, status, "<Error><Code>"+code+"</Code><Message>as the server says</Message></Error>", headers...)
}

func lost(r *http.Request) (*http.Response, error) {
	return nil, &net.OpError{Op: "read", Net: "tcp", Err: errors.New("connection reset by peer")}
}

// TestRetries says what is tried again, and what an error means.
func TestRetries(t *testing.T) {
	for _, c := range []struct {
		name   string
		answer func(*http.Request) (*http.Response, error)
		tries  int
		is     error // nil: none of the two
		says   string
	}{
		{"SlowDown", func(r *http.Request) (*http.Response, error) { return sayError(r, 503, "SlowDown") }, 5, storage.ErrUnavailable, "SlowDown (503): as the server says"},
		{"503", func(r *http.Request) (*http.Response, error) { return says(r, 503, "<html>busy</html>") }, 5, storage.ErrUnavailable, "ServiceUnavailable (503)"},
		{"500", func(r *http.Request) (*http.Response, error) { return sayError(r, 500, "InternalError") }, 5, storage.ErrUnavailable, "InternalError (500)"},
		{"502 of a proxy", func(r *http.Request) (*http.Response, error) {
			return says(r, 502, "<html>no", "Content-Type", "text/html")
		}, 5, storage.ErrUnavailable, "Bad Gateway (502)"},
		{"429", func(r *http.Request) (*http.Response, error) { return sayError(r, 429, "TooManyRequests") }, 5, storage.ErrUnavailable, "TooManyRequests (429)"},
		{"RequestTimeout", func(r *http.Request) (*http.Response, error) { return sayError(r, 400, "RequestTimeout") }, 5, storage.ErrUnavailable, "RequestTimeout (400)"},
		{"conflict", func(r *http.Request) (*http.Response, error) { return sayError(r, 409, "OperationAborted") }, 5, storage.ErrUnavailable, "OperationAborted (409)"},
		{"conflict at versitygw", func(r *http.Request) (*http.Response, error) { return sayError(r, 409, "ExistingObjectIsDirectory") }, 5, storage.ErrUnavailable, "ExistingObjectIsDirectory (409)"},
		{"reset", lost, 5, storage.ErrUnavailable, "does not answer: read tcp: connection reset"},
		{"clock", func(r *http.Request) (*http.Response, error) { return sayError(r, 403, "RequestTimeTooSkewed") }, 5, storage.ErrUnavailable, "set the clock"},
		{"no key", func(r *http.Request) (*http.Response, error) { return sayError(r, 404, "NoSuchKey") }, 1, fs.ErrNotExist, "reading k"},
		{"no key, otherwise", func(r *http.Request) (*http.Response, error) { return sayError(r, 404, "NotFound") }, 1, fs.ErrNotExist, "reading k"},
		{"404", func(r *http.Request) (*http.Response, error) { return says(r, 404, "") }, 5, storage.ErrUnavailable, "check the endpoint"},
		{"404 of a proxy", func(r *http.Request) (*http.Response, error) {
			return says(r, 404, "<html>default backend", "Content-Type", "text/html")
		}, 5, storage.ErrUnavailable, "check the endpoint"},
		{"no bucket", func(r *http.Request) (*http.Response, error) { return sayError(r, 404, "NoSuchBucket") }, 1, storage.ErrUnavailable, "https://s3.test has no bucket bucket: make it, or correct its name"},
		{"denied", func(r *http.Request) (*http.Response, error) { return sayError(r, 403, "AccessDenied") }, 1, storage.ErrUnavailable, "check the credentials"},
		{"signature", func(r *http.Request) (*http.Response, error) { return sayError(r, 403, "SignatureDoesNotMatch") }, 1, storage.ErrUnavailable, "check the credentials"},
		{"unknown to versitygw", func(r *http.Request) (*http.Response, error) { return sayError(r, 404, "XAdminUserNotFound") }, 1, storage.ErrUnavailable, "check the credentials"},
		{"region", func(r *http.Request) (*http.Response, error) {
			return sayError(r, 400, "AuthorizationHeaderMalformed")
		}, 1, storage.ErrUnavailable, "correct the endpoint or the region"},
		{"redirect", func(r *http.Request) (*http.Response, error) {
			return sayError(r, 301, "PermanentRedirect", "Location", "https://elsewhere.test/?secret=thesecret")
		}, 1, storage.ErrUnavailable, "correct the endpoint or the region"},
		{"307", func(r *http.Request) (*http.Response, error) {
			return says(r, 307, "", "Location", "https://elsewhere.test/?secret=thesecret")
		}, 1, storage.ErrUnavailable, "sends elsewhere (307)"},
		{"unknown", func(r *http.Request) (*http.Response, error) { return sayError(r, 501, "NotImplemented") }, 1, nil, "does not know how to: NotImplemented (501)"},
		{"odd", func(r *http.Request) (*http.Response, error) { return sayError(r, 400, "Odd") }, 1, nil, "Odd (400): as the server says"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tries := 0
				b := scripted(t, func(n int, r *http.Request) (*http.Response, error) {
					tries = n
					return c.answer(r)
				})
				began := time.Now()
				_, _, err := b.get(context.Background(), "k", 0, -1)
				if err == nil || !strings.Contains(err.Error(), c.says) {
					t.Errorf("got %v, want something of %q", err, c.says)
				}
				for _, is := range []error{storage.ErrUnavailable, fs.ErrNotExist} {
					if errors.Is(err, is) != (is == c.is) {
						t.Errorf("%v: is %v: %v", err, is, errors.Is(err, is))
					}
				}
				if tries != c.tries {
					t.Errorf("tried %d times, want %d", tries, c.tries)
				}
				if took := time.Since(began); took > patience {
					t.Errorf("took %v", took)
				}
				for _, secret := range []string{"thesecret", "thekey", "X-Amz", "elsewhere.test"} {
					if strings.Contains(err.Error(), secret) {
						t.Errorf("%q is in %v", secret, err)
					}
				}
			})
		})
	}
}

func TestOneFaultIsNoError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := scripted(t, func(n int, r *http.Request) (*http.Response, error) {
			switch n {
			case 1:
				return sayError(r, 503, "SlowDown")
			case 2:
				return lost(r)
			}
			return says(r, 200, "value", "ETag", `"e"`)
		})
		if data, _, err := b.read(context.Background(), "k", 10); err != nil || string(data) != "value" {
			t.Errorf("%q, %v", data, err)
		}
		if n := b.called()["get"]; n != 3 {
			t.Errorf("%d requests are counted", n)
		}
	})
}

func TestRetryAfter(t *testing.T) {
	for _, c := range []struct {
		header        string
		least, within time.Duration
	}{
		{"3", 3 * time.Second, 3 * time.Second},
		{"7200", obeyed, obeyed}, // not for ever
		{"soon", firstWait / 2, firstWait},
		{"-5", firstWait / 2, firstWait},
	} {
		synctest.Test(t, func(t *testing.T) {
			b := scripted(t, func(n int, r *http.Request) (*http.Response, error) {
				if n == 1 {
					return sayError(r, 503, "SlowDown", "Retry-After", c.header)
				}
				return says(r, 200, "")
			})
			began := time.Now()
			if _, err := b.head(context.Background(), "k"); err != nil {
				t.Error(err)
			}
			if took := time.Since(began); took < c.least || took > c.within {
				t.Errorf("Retry-After %s: took %v", c.header, took)
			}
		})
	}
}

// TestSecretsInAnswers has a server tell what it was told, and a network that tells
// URLs.
func TestSecretsInAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := scripted(t, func(n int, r *http.Request) (*http.Response, error) {
			if r.Method == "HEAD" {
				return nil, fmt.Errorf("proxy: cannot get https://s3.test/bucket/k?X-Amz-Signature=abc and thesecret")
			}
			return says(r, 403, "<Error><Code>Odd</Code><Message>thekey and thesecret, at /k?X-Amz-Signature=abc "+strings.Repeat("x", 5000)+"</Message></Error>")
		})
		_, _, got := b.get(context.Background(), "k", 0, -1)
		_, head := b.head(context.Background(), "k")
		for _, err := range []error{got, head} {
			for _, secret := range []string{"thesecret", "thekey", "Signature=", "Credential"} {
				if strings.Contains(err.Error(), secret) {
					t.Errorf("%q is in %v", secret, err)
				}
			}
			if len(err.Error()) > 1000 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
		}
	})
}

// TestBreaker has calls fail at once while a server does not answer, one go out now
// and then, and all go out when one is answered.
func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up, tries := false, 0
		b := scripted(t, func(n int, r *http.Request) (*http.Response, error) {
			tries++
			if up {
				return says(r, 200, "")
			}
			return lost(r)
		})
		ask := func() (time.Duration, error) {
			began := time.Now()
			_, err := b.head(context.Background(), "k")
			return time.Since(began), err
		}
		if _, err := ask(); !errors.Is(err, storage.ErrUnavailable) || !b.breaker.open() {
			t.Fatalf("after %d tries: %v, open: %v", tries, err, b.breaker.open())
		}
		tries = 0
		if took, err := ask(); !errors.Is(err, storage.ErrUnavailable) || took != 0 || tries != 0 {
			t.Errorf("while it is open: %v after %v and %d tries", err, took, tries)
		}
		// The pauses are 1, 2, 4, 8, 16 and then 30 s, each with one trial.
		for range 10 * 60 {
			<-time.After(time.Second) // of the bubble's clock
			for range 3 {
				if took, err := ask(); !errors.Is(err, storage.ErrUnavailable) || took != 0 {
					t.Fatalf("while it is down: %v after %v", err, took)
				}
			}
		}
		if tries < 15 || tries > 30 {
			t.Errorf("%d trials in 10 minutes", tries)
		}
		up = true
		<-time.After(longestPause)
		for range 3 {
			if took, err := ask(); err != nil || took != 0 {
				t.Errorf("when it is up again: %v after %v", err, took)
			}
		}
		if b.breaker.open() {
			t.Error("it is still open")
		}
	})
}

// TestTrialThatHangs has another trial go out while the first hangs.
func TestTrialThatHangs(t *testing.T) {
	var b breaker
	now := time.Now()
	for range tooMany {
		b.failed(now)
	}
	if b.allow(now) || b.allow(now.Add(firstPause-1)) {
		t.Error("a trial at once")
	}
	now = now.Add(firstPause)
	if !b.allow(now) || b.allow(now) {
		t.Error("not one trial")
	}
	if now = now.Add(2 * firstPause); !b.allow(now) {
		t.Error("no other trial")
	}
}

func TestOtherAnswersAreNoFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := scripted(t, func(n int, r *http.Request) (*http.Response, error) {
			if n%5 == 0 {
				return says(r, 404, "")
			}
			return lost(r)
		})
		for range 20 {
			if _, err := b.head(context.Background(), "k"); !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
		}
	})
}

// TestConflictsAreNoFailures has a server answer that something else is going on where
// it was asked for something.
func TestConflictsAreNoFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := scripted(t, func(n int, r *http.Request) (*http.Response, error) {
			return sayError(r, 409, "OperationAborted")
		})
		for range 3 {
			if _, err := b.head(context.Background(), "k"); !errors.Is(err, storage.ErrUnavailable) {
				t.Error(err)
			}
		}
		if b.breaker.open() {
			t.Error("they open the breaker")
		}
	})
}

func TestContextEndsACall(t *testing.T) {
	t.Run("while it waits", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := scripted(t, func(n int, r *http.Request) (*http.Response, error) {
				return sayError(r, 503, "SlowDown", "Retry-After", "9")
			})
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			began := time.Now()
			_, err := b.head(ctx, "k")
			if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second || !strings.Contains(err.Error(), "SlowDown") {
				t.Errorf("%v after %v", err, time.Since(began))
			}
		})
	})
	t.Run("while it is out", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := scripted(t, hang)
			for range 2 * tooMany {
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				if _, err := b.head(ctx, "k"); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("got %v", err)
				}
				cancel()
			}
			if b.breaker.open() {
				t.Error("callers that go are taken for a server that does not answer")
			}
			for range tooMany {
				ctx, cancel := context.WithTimeout(context.Background(), unanswered)
				b.head(ctx, "k")
				cancel()
			}
			if !b.breaker.open() {
				t.Error("a server that lets everyone wait is not noticed")
			}
		})
	})
}

func hang(_ int, r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, r.Context().Err()
}

func TestNoAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := scripted(t, hang)
		began := time.Now()
		_, err := b.head(context.Background(), "k")
		if !errors.Is(err, storage.ErrUnavailable) || !strings.Contains(err.Error(), "nothing came for too long") {
			t.Errorf("got %v", err)
		}
		if took := time.Since(began); took != kinds[opHead].answer {
			t.Errorf("took %v", took)
		}
	})
}

// TestSlowServer has a server take its time over a body that it is sent, but not for
// ever.
func TestSlowServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		data, sum := content(100)
		pause := kinds[opPut].answer - time.Second
		b := scripted(t, func(n int, r *http.Request) (*http.Response, error) {
			for range data {
				select {
				case <-time.After(pause):
				case <-r.Context().Done():
					return nil, r.Context().Err()
				}
				if _, err := io.ReadFull(r.Body, make([]byte, 1)); err != nil {
					return nil, err
				}
			}
			return says(r, 200, "")
		})
		if _, err := b.put(context.Background(), "k", bytes.NewReader(data), 100, sum); err != nil {
			t.Errorf("a slow server: %v", err)
		}
		pause += 2 * time.Second
		began := time.Now()
		_, err := b.put(context.Background(), "k", bytes.NewReader(data), 100, sum)
		if !errors.Is(err, storage.ErrUnavailable) || !strings.Contains(err.Error(), "nothing came for too long") {
			t.Errorf("a server that stands still: %v", err)
		}
		if took := time.Since(began); took > putPatience+kinds[opPut].answer {
			t.Errorf("took %v", took)
		}
	})
}

func TestExpiredCredentials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := scripted(t, func(n int, r *http.Request) (*http.Response, error) {
			if n == 1 {
				return sayError(r, 400, "ExpiredToken")
			}
			return says(r, 200, "value")
		})
		refreshed := 0
		b.remote.Load().refresh = func() { refreshed++ }
		if data, _, err := b.read(context.Background(), "k", 10); err != nil || string(data) != "value" || refreshed != 1 {
			t.Errorf("%q, %v, refreshed %d times", data, err, refreshed)
		}
	})
}

// endless is a body without an end.
type endless struct{ read int }

func (e *endless) Read(p []byte) (int, error) {
	e.read += len(p)
	return len(p), nil
}

func (e *endless) Close() error { return nil }

func TestEndlessAnswer(t *testing.T) {
	for _, status := range []int{200, 400} {
		synctest.Test(t, func(t *testing.T) {
			var body endless
			b := scripted(t, func(n int, r *http.Request) (*http.Response, error) {
				resp, err := says(r, status, "")
				resp.Header.Del("Content-Length")
				resp.Body, resp.ContentLength = &body, -1
				if n > 1 {
					resp.StatusCode = 403
					resp.Body = http.NoBody
				}
				return resp, err
			})
			for _, err := range b.list(context.Background(), "", true) {
				if err == nil {
					t.Error("no error")
				}
			}
			if body.read > longestAnswer+1<<20 {
				t.Errorf("%d: read %d bytes", status, body.read)
			}
		})
	}
}

// drip is a body that yields a byte each time its pause is over.
type drip struct {
	ctx   context.Context
	pause time.Duration
	left  int
}

func (d *drip) Read(p []byte) (int, error) {
	if d.left == 0 {
		return 0, io.EOF
	}
	select {
	case <-time.After(d.pause):
		d.left--
		p[0] = 'x'
		return 1, nil
	case <-d.ctx.Done():
		return 0, d.ctx.Err()
	}
}

func (d *drip) Close() error { return nil }

// TestSlowBodies has bodies take as long as they take, but not stand still.
func TestSlowBodies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pause := stall - time.Second
		b := scripted(t, func(n int, r *http.Request) (*http.Response, error) {
			resp, err := says(r, 200, "")
			resp.Body, resp.ContentLength = &drip{r.Context(), pause, 100}, 100
			resp.Header.Set("Content-Length", "100")
			return resp, err
		})
		r, _, err := b.get(context.Background(), "k", 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(r); err != nil || len(got) != 100 {
			t.Errorf("a slow body: %d bytes, %v", len(got), err)
		}
		r.Close()

		if r, _, err = b.get(context.Background(), "k", 0, -1); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			<-time.After(time.Hour) // of a reader who takes his time, by the bubble's clock
			if _, err := io.ReadFull(r, make([]byte, 10)); err != nil {
				t.Errorf("a slow reader: %v", err)
			}
		}
		r.Close()

		pause = stall + time.Second
		if r, _, err = b.get(context.Background(), "k", 0, -1); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(r); !errors.Is(err, storage.ErrUnavailable) || !strings.Contains(err.Error(), "broke off") {
			t.Errorf("a body that stands still: %v", err)
		}
		r.Close()
	})
}

func TestShortBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := scripted(t, func(n int, r *http.Request) (*http.Response, error) {
			resp, err := says(r, 206, "12345", "Content-Range", "bytes 2-9/10")
			resp.ContentLength = -1
			resp.Header.Del("Content-Length")
			return resp, err
		})
		r, _, err := b.get(context.Background(), "k", 2, -1)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if got, err := io.ReadAll(r); !errors.Is(err, storage.ErrUnavailable) || len(got) != 5 {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	})
}

func TestNoRanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := scripted(t, func(n int, r *http.Request) (*http.Response, error) { return says(r, 200, "0123456789") })
		if _, _, err := b.get(context.Background(), "k", 2, 3); err == nil || !strings.Contains(err.Error(), "has no ranges") {
			t.Errorf("got %v", err)
		}
	})
}

// TestLostAnswerOfPut has what was stored not be sent again if the answer got lost,
// but be sent if what is there is older.
func TestLostAnswerOfPut(t *testing.T) {
	for _, c := range []struct {
		name string
		size int
		age  time.Duration
		puts int
		head int
	}{
		{"stored", worthAsking, 0, 1, 1},
		{"an older one", worthAsking, time.Hour, 2, 1},
		{"small", worthAsking - 1, 0, 2, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				data, sum := content(c.size)
				puts, heads := 0, 0
				b := scripted(t, func(n int, r *http.Request) (*http.Response, error) {
					switch r.Method {
					case "HEAD":
						heads++
						now := time.Now().UTC()
						resp, err := says(r, 200, "", "Date", now.Format(http.TimeFormat), "Last-Modified", now.Add(-c.age).Format(http.TimeFormat))
						resp.ContentLength = int64(c.size)
						resp.Header.Set("Content-Length", fmt.Sprint(c.size))
						return resp, err
					case "PUT":
						puts++
						if signed := r.Header.Get("X-Amz-Content-Sha256"); signed != sum || r.Header.Get("Content-Encoding") != "" || r.ContentLength != int64(c.size) {
							t.Errorf("PUT of %d bytes is signed as %s: %v", r.ContentLength, signed, r.Header)
						}
						if got, err := io.ReadAll(r.Body); err != nil || !bytes.Equal(got, data) {
							t.Errorf("PUT %d: %d bytes, %v", puts, len(got), err)
						}
						if puts == 1 {
							return lost(r)
						}
						return says(r, 200, "")
					}
					return says(r, 400, "")
				})
				if _, err := b.put(context.Background(), "k", bytes.NewReader(data), int64(c.size), sum); err != nil {
					t.Fatal(err)
				}
				if puts != c.puts || heads != c.head {
					t.Errorf("%d PUT and %d HEAD, want %d and %d", puts, heads, c.puts, c.head)
				}
			})
		})
	}
}
