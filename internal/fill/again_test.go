package fill_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/caddy-registry/mirror/internal/fill"
)

// fickle delivers wrong content so many times.
type fickle struct {
	source
	wrong int64
	asks  atomic.Int64
}

func (s *fickle) Open(ctx context.Context, span fill.Span) (*fill.Stream, error) {
	from := &s.source
	if s.asks.Add(1) <= s.wrong {
		bad := slices.Clone(s.data)
		bad[len(bad)/2] ^= 1
		from = &source{name: s.name, data: bad}
	}
	return from.Open(ctx, span)
}

// TestAgain: small content that came wrong from everyone is asked for once
// more, which nobody notices, and not for ever.
func TestAgain(t *testing.T) {
	data, d := random(100_000)
	for _, c := range []struct {
		wrong []int64 // of each source
		good  bool
		asks  int64 // how often all were asked
	}{
		{[]int64{1}, true, 2},
		{[]int64{2}, false, 2},
		{[]int64{1, 1}, true, 3},
		{[]int64{1, 0}, true, 2},
		{[]int64{9, 9}, false, 4},
	} {
		x := newTable(t)
		var sources []fill.Source
		var all []*fickle
		for _, wrong := range c.wrong {
			s := &fickle{source: source{name: "s", data: data}, wrong: wrong}
			sources, all = append(sources, s), append(all, s)
		}
		f := x.join(t, d, len(data), "r", sources...)
		got, err := read(t, f, 0, len(data), true)
		f.Release()
		if c.good && (err != nil || !bytes.Equal(got, data)) || !c.good && (!errors.Is(err, fill.ErrDigest) || len(got) > 0) {
			t.Errorf("%v times wrong: %d bytes, %v", c.wrong, len(got), err)
		}
		var asks int64
		for _, s := range all {
			asks += s.asks.Load()
		}
		if asks != c.asks {
			t.Errorf("%v times wrong: asked %d times, want %d", c.wrong, asks, c.asks)
		}
	}
}
