package hosted

import (
	"hash"
	"io"
	"sync"
	"sync/atomic"
)

// convey writes what a reader gives, to its end, of which the first buffer is full. It
// reads, writes and, where there are two, computes each of the hashes at the same time,
// so that it takes as long as the slowest of these does: a run is written once it has
// been read, hashed once it has been written, and its buffer is free again once every
// hash has taken it.
//
// So a hash never has what the file has not. It may be some runs behind; nobody reads it
// before it has been waited for.
func (w *writer) convey(r io.Reader, first *[largeBuffer]byte) error {
	free := make(chan *buffer, maxBuffers)
	for range maxBuffers - 1 {
		free <- nil // not made yet
	}
	if w.upload.sums.other != nil && !w.upload.late { // one hash is quicker in the writer, whose cache has the run
		w.behind = newHashing(&w.upload.sums, free)
	}
	runs, done := make(chan *buffer, maxBuffers), make(chan error, 1)
	var over atomic.Bool
	go func() {
		var failed error
		for b := range runs {
			if w.behind != nil {
				w.behind.of = b
			}
			if failed == nil {
				if failed = w.write(b.bytes[:b.n]); failed != nil {
					over.Store(true)
				}
			}
			b.leave(free)
		}
		done <- failed
	}()
	b, err := &buffer{bytes: first, n: largeBuffer}, error(nil)
	b.users.Store(1)
	runs <- b
	for err == nil && !over.Load() {
		if b = <-free; b == nil {
			b = &buffer{bytes: largeBuffers.Get().(*[largeBuffer]byte)}
		}
		b.users.Store(1)
		b.n, err = readFull(r, b.bytes[:])
		runs <- b
	}
	close(runs)
	failed := <-done
	if w.behind != nil {
		w.behind.close()
		w.behind = nil
	}
	for range maxBuffers {
		if b := <-free; b != nil {
			largeBuffers.Put(b.bytes)
		}
	}
	if failed != nil {
		return failed
	}
	return ended(err)
}

// A buffer is a run of bytes on its way.
type buffer struct {
	bytes *[largeBuffer]byte
	n     int          // that were read
	users atomic.Int32 // who are not done with it
}

// leave says that one is done with it. The last gives it back.
func (b *buffer) leave(free chan<- *buffer) {
	if b.users.Add(-1) == 0 {
		free <- b
	}
}

// A hashing takes what has been written into the hashes of an upload, each in a
// goroutine of its own. Its methods are the writer's to call.
type hashing struct {
	of    *buffer // that is being written
	lanes []chan hashed
	under sync.WaitGroup // what has not been taken by a hash yet, once for each
	ended sync.WaitGroup
}

// hashed is what of a buffer is to be hashed.
type hashed struct {
	*buffer
	run []byte
}

func newHashing(s *sums, free chan<- *buffer) *hashing {
	h := &hashing{}
	for _, sum := range []hash.Hash{s.sha256, s.other} {
		lane := make(chan hashed, maxBuffers) // never full
		h.lanes = append(h.lanes, lane)
		h.ended.Go(func() {
			for b := range lane {
				sum.Write(b.run)
				h.under.Done()
				b.leave(free)
			}
		})
	}
	return h
}

// take has a run hashed of the buffer that is being written.
func (h *hashing) take(run []byte) {
	h.of.users.Add(int32(len(h.lanes)))
	h.under.Add(len(h.lanes))
	for _, lane := range h.lanes {
		lane <- hashed{h.of, run}
	}
}

// wait waits until the hashes have everything that was taken.
func (h *hashing) wait() { h.under.Wait() }

// close waits, and ends the goroutines.
func (h *hashing) close() {
	for _, lane := range h.lanes {
		close(lane)
	}
	h.ended.Wait()
}
