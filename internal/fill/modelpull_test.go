package fill_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/fill"
)

// pulling is who pulls in a schedule; below somePull, nobody does.
type pulling int

const (
	somePull pulling = 2
	allPull  pulling = 3
)

var errTake = errors.New("it could not be taken")

// puller pulls the content, and may leave.
func (m *model) puller() {
	want := m.want(0)
	want.Repository = ""
	if m.byName {
		want.Digest, want.Name = "", "model"
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	leaves := m.chance(3)
	if leaves {
		defer time.AfterFunc(time.Duration(m.n(int(2*time.Second))), cancel).Stop()
	}
	var said error
	asked := 0
	want.Take = func(ctx context.Context, f fill.File) error {
		asked++
		said = m.take(ctx, f)
		return said
	}
	err := m.table.Pull(ctx, want, func(n int64) {
		if n < 0 || n > int64(len(m.content)) {
			m.t.Errorf("it has come to %d of %d", n, len(m.content))
		}
	})
	switch {
	case asked > 0 && err == said:
		if asked > 2 {
			m.t.Errorf("it was asked %d times", asked)
		}
	case err == nil:
		m.t.Error("nobody took it")
	case errors.Is(err, context.Canceled) && leaves:
	case errors.Is(err, fill.ErrClosed) && m.closes:
	case m.wrong && errors.Is(err, fill.ErrDigest):
	case m.store.isFull():
	case m.healthy && !m.wrong:
		m.t.Errorf("it was not pulled: %v, though there is a source that works", err)
	}
}

// take takes a file, or does not.
func (m *model) take(ctx context.Context, f fill.File) error {
	m.pause(ctx, 20*time.Millisecond)
	outcome := m.n(6)
	honest := !m.wrong || !m.byName
	want := fill.File{Path: f.Path, Size: int64(len(m.content)), SHA256: digest.FromBytes(m.content), SHA512: digest.SHA512.FromBytes(m.content)}
	if honest && f != want {
		m.t.Errorf("offered %+v, want %+v", f, want)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if f.Path == "" {
		if m.consumed == 0 {
			m.t.Error("the file is gone, and nobody had it")
		}
		if m.elsewhere && outcome > 0 {
			return nil
		}
		m.consumed++
		return fmt.Errorf("the bytes: %w", fs.ErrNotExist)
	}
	got, err := os.ReadFile(f.Path)
	if err != nil {
		m.t.Error(err)
	}
	if honest && !bytes.Equal(got, m.content) || digest.FromBytes(got) != f.SHA256 {
		m.t.Error("wrong content is offered")
	}
	switch outcome {
	case 0:
		m.consumed++
		return fmt.Errorf("%w: by the model", fill.ErrRefused)
	case 1:
		return errTake
	}
	m.consumed++
	m.elsewhere = true
	os.Remove(f.Path)
	if outcome == 2 {
		return errTake
	}
	return nil
}

func (s *modelStore) isFull() bool {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	return s.full
}
