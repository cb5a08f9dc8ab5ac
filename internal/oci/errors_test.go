package oci

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strconv"
	"testing"
	"time"
)

type errorBody struct {
	Errors []struct {
		Code, Message string
		Detail        any
	}
}

func TestErrorWrite(t *testing.T) {
	e := &Error{Status: http.StatusNotFound, Code: CodeManifestUnknown, Message: `no "x" <here>`, Detail: map[string]any{"tag": "x"}}
	w := httptest.NewRecorder()
	w.Header().Set("ETag", `"sha256:old"`)
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", "123456")
	e.Write(w, httptest.NewRequest(http.MethodGet, "/v2/x/manifests/x", nil))
	if w.Code != http.StatusNotFound {
		t.Errorf("status %d", w.Code)
	}
	// dockerd reads the body only if its type is exactly this.
	if got := w.Header()["Content-Type"]; len(got) != 1 || got[0] != "application/json" {
		t.Errorf("Content-Type %q", got)
	}
	if got, want := w.Header().Get("Content-Length"), strconv.Itoa(w.Body.Len()); got != want {
		t.Errorf("Content-Length %s, body has %s", got, want)
	}
	if w.Header().Get("ETag") != "" || w.Header().Get("Cache-Control") != "no-store" || w.Header().Get("Retry-After") != "" {
		t.Errorf("header %v", w.Header())
	}
	var body errorBody
	if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil {
		t.Fatal(err)
	}
	if len(body.Errors) != 1 || body.Errors[0].Code != e.Code || body.Errors[0].Message != e.Message {
		t.Errorf("body %s", w.Body)
	}
	if detail, ok := body.Errors[0].Detail.(map[string]any); !ok || detail["tag"] != "x" {
		t.Errorf("detail %v", body.Errors[0].Detail)
	}
}

func TestErrorWriteHeadHasNoBody(t *testing.T) {
	e := &Error{Status: http.StatusForbidden, Code: CodeDenied, Message: "no"}
	get, head := httptest.NewRecorder(), httptest.NewRecorder()
	e.Write(get, httptest.NewRequest(http.MethodGet, "/v2/", nil))
	e.Write(head, httptest.NewRequest(http.MethodHead, "/v2/", nil))
	if head.Body.Len() != 0 {
		t.Errorf("HEAD got %q", head.Body)
	}
	if get.Body.Len() == 0 || head.Code != get.Code || head.Header().Get("Content-Length") != get.Header().Get("Content-Length") ||
		head.Header().Get("Content-Type") != "application/json" {
		t.Errorf("HEAD %d %v, GET %d %v", head.Code, head.Header(), get.Code, get.Header())
	}
}

func TestErrorRetryAfterRoundsUp(t *testing.T) {
	for _, c := range []struct {
		after time.Duration
		want  string
	}{
		{0, ""},
		{-time.Second, ""},
		{time.Nanosecond, "1"},
		{time.Second, "1"},
		{time.Second + time.Millisecond, "2"},
		{90 * time.Second, "90"},
		{time.Hour, "3600"},
	} {
		w := httptest.NewRecorder()
		(&Error{Status: http.StatusTooManyRequests, Code: CodeTooManyRequests, RetryAfter: c.after}).Write(w, httptest.NewRequest(http.MethodGet, "/v2/", nil))
		if got := w.Header().Get("Retry-After"); got != c.want {
			t.Errorf("Retry-After for %v: %q, want %q", c.after, got, c.want)
		}
	}
}

func TestErrorWriteWithoutUsableDetail(t *testing.T) {
	w := httptest.NewRecorder()
	(&Error{Status: http.StatusBadRequest, Code: CodeNameInvalid, Message: "m", Detail: func() {}}).Write(w, httptest.NewRequest(http.MethodGet, "/v2/", nil))
	var body errorBody
	if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil || len(body.Errors) != 1 || body.Errors[0].Code != CodeNameInvalid {
		t.Errorf("body %q: %v", w.Body, err)
	}
}
