//go:build e2e

package e2e

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
)

// accessLog makes a mirror say what it has been asked.
const accessLog = "log"

// A request is a line of the access log.
type request struct {
	Status  int
	Size    int64 // of what was sent of the body
	Request struct {
		Method, URI string
		Headers     http.Header
	}
}

// said tells whether the mirror has logged something about a blob.
func (m *mirror) said(message, digest string) bool {
	for line := range strings.Lines(m.output()) {
		if strings.Contains(line, `"msg":"`+message+`"`) && strings.Contains(line, digest) {
			return true
		}
	}
	return false
}

// asked are the finished requests for a blob.
func (m *mirror) asked(t *testing.T, digest string) []request {
	t.Helper()
	var requests []request
	for line := range strings.Lines(m.output()) {
		var r request
		if !strings.Contains(line, `"http.log.access`) || !strings.Contains(line, digest) {
			continue
		}
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		requests = append(requests, r)
	}
	return requests
}
