package upstream

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// line lets takers come one after the other, and writes down who is seated.
type line struct {
	t      *testing.T
	places *places
	seated []string
	mu     sync.Mutex
}

// comes lets one take a place, and returns how he may give up waiting.
func (l *line) comes(name string, background bool) (leave context.CancelCauseFunc) {
	ctx, cancel := context.WithCancelCause(context.Background())
	go func() {
		_, err := l.places.take(ctx, background, nil)
		l.mu.Lock()
		defer l.mu.Unlock()
		if err != nil {
			name += ": " + err.Error()
		}
		l.seated = append(l.seated, name)
	}()
	synctest.Wait()
	return cancel
}

func (l *line) goes(background bool) {
	l.places.give(background)
	synctest.Wait()
}

// want looks at who has been seated since it was last asked.
func (l *line) want(names ...string) {
	l.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if !slices.Equal(l.seated, names) {
		l.t.Errorf("seated: %q, want %q", l.seated, names)
	}
	l.seated = nil
}

func TestPlacesInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &line{t: t, places: &places{limit: 2}}
		l.comes("a", false)
		l.comes("b", false)
		l.want("a", "b")
		l.comes("background 1", true)
		l.comes("c", false)
		l.comes("background 2", true)
		l.comes("d", false)
		l.want()
		l.goes(false)
		l.want("c")
		l.goes(false)
		l.want("d")
		l.goes(false)
		l.want("background 1")
		l.goes(false) // the other half is the foreground's
		l.want()
		l.comes("e", false)
		l.want("e")
		l.goes(true)
		l.want("background 2")
		l.goes(true)
		l.goes(false)
		if p := l.places; p.taken != 0 || p.background != 0 || p.waiting.Len() != 0 || p.behind.Len() != 0 {
			t.Errorf("in the end: %d taken, %d of them by the background, %d and %d waiting", p.taken, p.background, p.waiting.Len(), p.behind.Len())
		}
	})
}

func TestPlacesHalf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &line{t: t, places: &places{limit: 4}}
		l.comes("1", true)
		l.comes("2", true)
		l.comes("3", true)
		l.want("1", "2")
		for _, name := range []string{"a", "b"} { // no need to wait for the background
			l.comes(name, false)
			l.want(name)
		}
		l.comes("c", false)
		l.want()
		l.goes(true)
		l.want("c")
		l.goes(false)
		l.want("3")
		l.goes(true)
		l.goes(true)
		l.goes(false)
		l.goes(false)
		l.want()
	})
}

func TestPlacesCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &line{t: t, places: &places{limit: 2}}
		l.comes("a", false)
		l.comes("b", true)
		l.want("a", "b")
		gone := errors.New("gone")
		first := l.comes("first", false)
		l.comes("second", false)
		behind := l.comes("behind", true)
		first(gone)
		synctest.Wait()
		behind(gone)
		synctest.Wait()
		l.want("first: gone", "behind: gone")
		l.goes(false)
		l.want("second")
		l.goes(true)
		l.goes(false)
		l.want()
		if p := l.places; p.taken != 0 || p.background != 0 || p.waiting.Len() != 0 || p.behind.Len() != 0 {
			t.Errorf("in the end: %d taken, %d of them by the background, %d and %d waiting", p.taken, p.background, p.waiting.Len(), p.behind.Len())
		}
	})
}

// TestPlacesRush has many come, wait, leave and go at once: the bounds hold,
// and no place is lost.
func TestPlacesRush(t *testing.T) {
	p := &places{limit: 8}
	var mu sync.Mutex
	var all, behind int
	count := func(by int, background bool) {
		mu.Lock()
		defer mu.Unlock()
		all += by
		if background {
			behind += by
		}
		if all > 8 || behind > 4 {
			t.Errorf("%d have a place, %d of the background", all, behind)
		}
	}
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			background := i%2 == 0
			for j := range 200 {
				ctx, cancel := context.WithCancel(t.Context())
				if (i+j)%3 == 0 {
					go cancel()
				}
				if _, err := p.take(ctx, background, nil); err == nil {
					count(1, background)
					count(-1, background)
					p.give(background)
				}
				cancel()
			}
		})
	}
	wg.Wait()
	if p.taken != 0 || p.background != 0 || p.waiting.Len() != 0 || p.behind.Len() != 0 {
		t.Errorf("in the end: %d taken, %d of them by the background, %d and %d waiting", p.taken, p.background, p.waiting.Len(), p.behind.Len())
	}
}

// TestHurriedPlace: who waits in the background, and is waited for, goes before
// others of the background, and counts as one of the foreground.
func TestHurriedPlace(t *testing.T) {
	p := places{limit: 2}
	for range 2 {
		if _, err := p.take(t.Context(), false, nil); err != nil {
			t.Fatal(err)
		}
	}
	type got struct {
		name       string
		background bool
	}
	seated := make(chan got)
	wait := func(name string, hurry chan struct{}, behind int) {
		go func() {
			background, err := p.take(t.Context(), true, hurry)
			if err != nil {
				t.Error(err)
			}
			seated <- got{name, background}
		}()
		until(t, name+" to wait", func() bool {
			p.mu.Lock()
			defer p.mu.Unlock()
			return p.behind.Len() == behind
		})
	}
	wait("patient", nil, 1)
	hurry := make(chan struct{})
	wait("hurried", hurry, 2)
	close(hurry)
	until(t, "it to change lines", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.waiting.Len() == 1 && p.behind.Len() == 1
	})
	p.give(false)
	if g := <-seated; g != (got{"hurried", false}) {
		t.Errorf("%+v goes first", g)
	}
	p.give(false)
	if g := <-seated; g != (got{"patient", true}) {
		t.Errorf("%+v goes second", g)
	}
}

func until(t *testing.T, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
		runtime.Gosched()
	}
}
