package storagetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/caddy-registry/mirror/storage"
)

// Double is a distant store with faults, for tests of who uses one. Its distant
// place is memory; what is near lies in the store it is made of. What is put goes to
// both, unless the distant place is down: then it stays near.
type Double struct {
	storage.Store // near

	mu       sync.Mutex
	values   map[string][]byte
	wrong    map[string]bool // distrusted
	asked    []Asked
	blank    bool
	shared   bool
	trouble  func(Asked) error
	delivers func(ctx context.Context, key string, at int64) (n int64, err error)
}

// Asked is one request to the distant place: "get", "stat", "put" or "delete". Of a
// "get", Length is negative to the end.
type Asked struct {
	What, Key      string
	Offset, Length int64
}

// NewDouble returns a store whose distant place is empty.
func NewDouble(near storage.Store) *Double {
	return &Double{Store: near, values: map[string][]byte{}, wrong: map[string]bool{}}
}

// Place puts a value at the distant place, and not near.
func (d *Double) Place(key string, value []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.values[key] = bytes.Clone(value)
}

// Placed returns what is at the distant place under a key, or nil.
func (d *Double) Placed(key string) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return bytes.Clone(d.values[key])
}

// Asks returns the requests to the distant place for keys that begin with a prefix.
func (d *Double) Asks(what, prefix string) []Asked {
	d.mu.Lock()
	defer d.mu.Unlock()
	var asked []Asked
	for _, a := range d.asked {
		if a.What == what && strings.HasPrefix(a.Key, prefix) {
			asked = append(asked, a)
		}
	}
	return asked
}

// Blank lets the store know nothing of the distant place without asking.
func (d *Double) Blank() { d.set(func() { d.blank = true }) }

// Share lets the store say that others write to the same place.
func (d *Double) Share() { d.set(func() { d.shared = true }) }

// Trouble has each request fail as it says. It may block.
func (d *Double) Trouble(trouble func(Asked) error) { d.set(func() { d.trouble = trouble }) }

// Down has every request fail, or none.
func (d *Double) Down(down bool) {
	if !down {
		d.Trouble(nil)
		return
	}
	d.Trouble(func(Asked) error { return fmt.Errorf("%w: the double is down", storage.ErrUnavailable) })
}

// Deliver is asked, of a value that is being read, how many bytes may come from an
// offset on; it may block, and its error cuts the stream.
func (d *Double) Deliver(delivers func(ctx context.Context, key string, at int64) (n int64, err error)) {
	d.set(func() { d.delivers = delivers })
}

func (d *Double) set(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
}

// ask notes a request.
func (d *Double) ask(a Asked) error {
	d.mu.Lock()
	d.asked = append(d.asked, a)
	trouble := d.trouble
	d.mu.Unlock()
	if trouble == nil {
		return nil
	}
	return trouble(a)
}

func absent(err error) bool { return errors.Is(err, fs.ErrNotExist) }

// known describes a value at the distant place without reading it.
func (d *Double) known(key string) (storage.Info, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v, ok := d.values[key]
	if !ok {
		return storage.Info{}, fmt.Errorf("%s: %w", key, fs.ErrNotExist)
	}
	return storage.Info{Key: key, Size: int64(len(v)), ModTime: time.Unix(1, 0)}, nil
}

// Open implements storage.Store.
func (d *Double) Open(ctx context.Context, key string, offset, length int64) (io.ReadCloser, storage.Info, error) {
	r, info, err := d.Store.Open(ctx, key, offset, length)
	if !absent(err) {
		return r, info, err
	}
	if err := d.ask(Asked{"get", key, offset, length}); err != nil {
		return nil, storage.Info{}, err
	}
	if err := ctx.Err(); err != nil {
		return nil, storage.Info{}, err
	}
	if info, err = d.known(key); err != nil {
		return nil, info, err
	}
	if length < 0 {
		length = info.Size - offset
	}
	if offset < 0 || offset+length > info.Size {
		return nil, info, fmt.Errorf("%s has no %d bytes from %d", key, length, offset)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return io.NopCloser(&delivery{ctx, d, key, offset, d.values[key][:offset+length]}), info, nil
}

type delivery struct {
	ctx   context.Context
	from  *Double
	key   string
	at    int64
	value []byte
}

func (r *delivery) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	if r.at == int64(len(r.value)) {
		return 0, io.EOF
	}
	p = p[:min(len(p), 64<<10)]
	r.from.mu.Lock()
	delivers := r.from.delivers
	r.from.mu.Unlock()
	if delivers != nil {
		most, err := delivers(r.ctx, r.key, r.at)
		if err != nil {
			return 0, err
		}
		p = p[:min(int64(len(p)), most)]
	}
	n := copy(p, r.value[r.at:])
	r.at += int64(n)
	return n, nil
}

// Get implements storage.Store.
func (d *Double) Get(ctx context.Context, key string, limit int64) ([]byte, error) {
	data, err := d.Store.Get(ctx, key, limit)
	if !absent(err) {
		return data, err
	}
	if err := d.look(key); err != nil {
		return nil, err
	}
	r, info, err := d.Open(ctx, key, 0, -1)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if info.Size > limit {
		return nil, storage.ErrTooLarge
	}
	return io.ReadAll(r)
}

// look asks whether there is something, unless that is known.
func (d *Double) look(key string) error {
	d.mu.Lock()
	blank := d.blank
	d.mu.Unlock()
	if blank {
		if err := d.ask(Asked{What: "stat", Key: key}); err != nil {
			return err
		}
	}
	_, err := d.known(key)
	return err
}

// Stat implements storage.Store.
func (d *Double) Stat(ctx context.Context, key string) (storage.Info, error) {
	info, err := d.Store.Stat(ctx, key)
	if !absent(err) {
		return info, err
	}
	if err := d.look(key); err != nil {
		return storage.Info{}, err
	}
	return d.known(key)
}

// Put implements storage.Store.
func (d *Double) Put(ctx context.Context, key string, data []byte, durability storage.Durability) error {
	if err := d.Store.Put(ctx, key, data, durability); err != nil {
		return err
	}
	return d.take(key, data, durability)
}

// PutFile implements storage.Store.
func (d *Double) PutFile(ctx context.Context, key, path string, durability storage.Durability) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := d.Store.PutFile(ctx, key, path, durability); err != nil {
		return err
	}
	return d.take(key, data, durability)
}

// take brings a value to the distant place, unless the same may be there.
func (d *Double) take(key string, data []byte, durability storage.Durability) error {
	d.mu.Lock()
	has := len(d.values[key]) == len(data) && strings.HasSuffix(key, "/data") && !d.wrong[key]
	d.mu.Unlock()
	if has {
		return nil
	}
	if err := d.ask(Asked{What: "put", Key: key}); err != nil {
		if durability == storage.Lazy {
			return nil
		}
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.values[key] = bytes.Clone(data)
	delete(d.wrong, key)
	return nil
}

// Sync implements storage.Store.
func (d *Double) Sync(ctx context.Context, keys ...string) error {
	for _, key := range keys {
		data, err := d.Store.Get(ctx, key, 1<<40)
		if err == nil {
			err = d.take(key, data, storage.Durable)
		}
		if err != nil && !absent(err) {
			return err
		}
	}
	return d.Store.Sync(ctx, keys...)
}

// Delete implements storage.Store.
func (d *Double) Delete(ctx context.Context, key string) error {
	if err := d.ask(Asked{What: "delete", Key: key}); err != nil {
		return err
	}
	d.mu.Lock()
	delete(d.values, key)
	d.mu.Unlock()
	return d.Store.Delete(ctx, key)
}

// List implements storage.Store, of what is near: what a test has placed is not
// listed.
func (d *Double) List(ctx context.Context, prefix string, deep bool) iter.Seq2[storage.Info, error] {
	return d.Store.List(ctx, prefix, deep)
}

// Distant implements storage.Store.
func (d *Double) Distant() storage.Distant { return d }

// OpenNear implements storage.Distant.
func (d *Double) OpenNear(ctx context.Context, key string) (io.ReadCloser, storage.Info, error) {
	r, info, err := d.Store.Open(ctx, key, 0, -1)
	if !absent(err) {
		return r, info, err
	}
	if info, err = d.known(key); err != nil && !d.blank {
		return nil, info, err
	}
	if d.blank {
		info = storage.Info{Key: key, Size: -1}
	}
	return nil, info, fmt.Errorf("%s: %w", key, storage.ErrDistant)
}

// Drop implements storage.Distant.
func (d *Double) Drop(key string) bool {
	if _, err := d.known(key); err != nil {
		return false
	}
	if _, err := d.Store.Stat(context.Background(), key); err != nil {
		return false
	}
	return d.Store.Delete(context.Background(), key) == nil
}

// Distrust implements storage.Distant.
func (d *Double) Distrust(key string) { d.set(func() { d.wrong[key] = true }) }

// Distrusted reports whether that has been called, and nothing put since.
func (d *Double) Distrusted(key string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.wrong[key]
}

// Shared implements storage.Distant.
func (d *Double) Shared() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.shared
}

// Listed implements storage.Distant.
func (d *Double) Listed(context.Context) error { return nil }

// Relist implements storage.Distant.
func (d *Double) Relist(context.Context) error { return nil }

// Presign implements storage.Distant.
func (d *Double) Presign(_ context.Context, method, key string, life time.Duration) (string, error) {
	if _, err := d.known(key); err != nil {
		return "", err
	}
	return "https://bucket.test/" + key + "?method=" + method + "&expires=" + life.String(), nil
}

// Secret implements storage.Distant.
func (d *Double) Secret() []byte { return nil }

// Vouch implements storage.Store.
func (d *Double) Vouch(ctx context.Context, key string) error {
	err := d.Store.Vouch(ctx, key)
	if absent(err) {
		_, err = d.known(key)
	}
	return err
}
