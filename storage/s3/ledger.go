package s3

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"

	"go.uber.org/zap"
)

// A ledger is where an upload in parts stands: a file beside the near tier.
type ledger struct {
	key, path string
}

// page is what is in a ledger.
type ledgerPage struct {
	Key   string `json:"key"`
	Parts parts  `json:"parts"`
}

func (s *store) ledgers() string { return filepath.Join(s.root, filepath.FromSlash(ownDir), "parts") }

func (s *store) ledger(key string) ledger {
	return ledger{key, filepath.Join(s.ledgers(), sum([]byte(key))+".json")}
}

// read is what the ledger says. One that cannot be read says nothing; what it was
// about is swept.
func (l ledger) read() parts {
	page, err := readLedger(l.path)
	if err != nil || page.Key != l.key {
		return parts{}
	}
	return page.Parts
}

func readLedger(path string) (page ledgerPage, err error) {
	data, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(data, &page)
	}
	return page, err
}

func (l ledger) write(p parts) error {
	data, err := json.Marshal(ledgerPage{l.key, p})
	if err != nil {
		return err
	}
	if err := os.WriteFile(l.path+".new", data, 0o640); err != nil {
		return err
	}
	return os.Rename(l.path+".new", l.path)
}

func (l ledger) remove() { os.Remove(l.path) }

// forgo ends the upload in parts of a value that is to be deleted.
func (s *store) forgo(ctx context.Context, key string) error {
	l := s.ledger(key)
	p := l.read()
	if p.Upload == "" {
		return nil
	}
	err := s.bucket.abort(ctx, key, p)
	s.said(err)
	if err != nil && (outage(err) || ctx.Err() != nil) {
		return err
	}
	if err != nil && !absent(err) {
		// A deletion must not depend on a permission that only this needs.
		s.log.Warn("an upload in parts could not be ended, and stays until the bucket's own rules remove it; permit AbortMultipartUpload", zap.String("key", key), zap.Error(err))
	}
	l.remove()
	return nil
}

// sweepLedgers removes what is no ledger, before there are others than those that an
// earlier process has left.
func (s *store) sweepLedgers() error {
	files, err := os.ReadDir(s.ledgers())
	for _, file := range files {
		path := filepath.Join(s.ledgers(), file.Name())
		if _, err := readLedger(path); err != nil {
			os.Remove(path)
		}
	}
	return err
}

// tidyLedgers ends uploads in parts that will not be gone on with, and returns the
// others.
func (s *store) tidyLedgers(ctx context.Context) (claimed map[string]bool) {
	files, err := os.ReadDir(s.ledgers())
	if err != nil {
		return nil
	}
	claimed = map[string]bool{}
	for _, file := range files {
		page, err := readLedger(filepath.Join(s.ledgers(), file.Name()))
		if err != nil {
			continue // it is being written, or has just gone
		}
		if !s.endIdle(ctx, page.Key) {
			claimed[page.Parts.Upload] = true
		}
	}
	return claimed
}

// endIdle ends what was begun in parts under a key, if nothing is going on with it. It
// takes the slot, so that it does not end what is begun meanwhile.
func (s *store) endIdle(ctx context.Context, key string) (ended bool) {
	p := s.stripe(key)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.states[key] != nil {
		return false
	}
	if _, err := s.near.Stat(ctx, key); !absent(err) && !s.spare(p, key) {
		return false // it may turn out that it has to be uploaded
	}
	if _, err := s.take(ctx, p, key, false); err != nil {
		return false
	}
	defer s.give(p, key)
	p.mu.Unlock()
	err := s.forgo(ctx, key)
	p.mu.Lock()
	return err == nil
}

// sweepUploads ends uploads in parts that somebody has begun and left.
func (s *store) sweepUploads(ctx context.Context) {
	claimed := s.tidyLedgers(ctx)
	if claimed == nil || s.owner.shared.Load() {
		return // they may be the other's
	}
	_, err := s.bucket.sweepUploads(ctx, sweepAge, func(_, upload string) bool { return claimed[upload] })
	if err != nil && ctx.Err() == nil {
		s.log.Info("uploads in parts that nobody goes on with could not be swept", zap.Error(err))
	}
}
