package module

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/caddy-registry/mirror/internal/retain"
)

// following is a command that follows a job of a server, and what it prints.
func following(t *testing.T, ctx context.Context, jobs http.HandlerFunc) (out, errs string, err error) {
	t.Helper()
	server := httptest.NewServer(jobs)
	defer server.Close()
	defer http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	var stdout, stderr bytes.Buffer
	cmd := &cobra.Command{}
	cmd.Flags().Bool("json", false, "")
	cmd.SetOut(&stdout)
	cmd.SetErr(&stderr)
	cmd.SetContext(ctx)
	err = follow(cmd, api(strings.TrimPrefix(server.URL, "http://")), retain.Job{ID: "gc-1", Kind: "gc", Unit: "blobs"})
	return stdout.String(), stderr.String(), err
}

// TestFollowInterrupted: who interrupts a command leaves the job to itself, and is
// told so.
func TestFollowInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, _, err := following(t, ctx, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || r.URL.Path != "/registry/jobs/gc-1" {
			t.Errorf("%s %s", r.Method, r.URL)
		}
		json.NewEncoder(w).Encode(retain.Job{ID: "gc-1", Kind: "gc", Unit: "blobs", Done: 1, Total: 2})
		cancel()
	})
	if err == nil || !strings.Contains(err.Error(), "goes on") || !strings.Contains(err.Error(), "caddy registry jobs gc-1") {
		t.Errorf("%v", err)
	}
}

// TestFollowCtrlC: so is who presses Ctrl-C.
func TestFollowCtrlC(t *testing.T) {
	_, _, err := following(t, t.Context(), func(w http.ResponseWriter, r *http.Request) {
		json.NewEncoder(w).Encode(retain.Job{ID: "gc-1", Kind: "gc", Unit: "blobs", Done: 1, Total: 2})
		if err := syscall.Kill(os.Getpid(), syscall.SIGINT); err != nil {
			t.Error(err)
		}
	})
	if err == nil || !strings.Contains(err.Error(), "goes on without you") {
		t.Errorf("%v", err)
	}
}

// TestFollowTrouble: an admin API that is away for a moment, as while Caddy
// reloads, does not end a command; one that stays away does, and so does a job
// that fails.
func TestFollowTrouble(t *testing.T) {
	asked := 0
	out, errs, err := following(t, t.Context(), func(w http.ResponseWriter, r *http.Request) {
		if asked++; asked <= 2 {
			panic(http.ErrAbortHandler)
		}
		now := time.Now()
		json.NewEncoder(w).Encode(retain.Job{ID: "gc-1", Kind: "gc", Begun: now, Ended: now, Error: "the disk is on fire"})
	})
	if err == nil || err.Error() != "gc: the disk is on fire" || !strings.HasPrefix(out, "gc: removed 0 ") || errs != "" {
		t.Errorf("%q %q %v", out, errs, err)
	}
	asked = 0
	_, _, err = following(t, t.Context(), func(w http.ResponseWriter, r *http.Request) {
		asked++
		w.WriteHeader(http.StatusServiceUnavailable)
		w.Write([]byte(`{"error": "nobody home"}`))
	})
	if err == nil || err.Error() != "nobody home" || asked != maxMissed {
		t.Errorf("%v after %d questions", err, asked)
	}
}
