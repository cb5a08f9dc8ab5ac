package longhorn

import (
	"bytes"
	"context"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"
)

// fetch begins to download an image. The caller holds the lock.
func (m *Manager) fetch(b *image) {
	if m.ctx.Err() != nil {
		return
	}
	b.done, b.failing, b.message, b.progress, b.size = false, false, "", 0, 0
	address := b.parameters["url"]
	if !m.since(V1_7) {
		address, _, _ = strings.Cut(address, "=") // longhorn/longhorn#7822
	}
	m.working.Go(func() {
		size, body, err := m.request(b, address)
		if err == nil {
			m.mu.Lock()
			b.size = max(0, size)
			m.mu.Unlock()
			m.take(b, body, size)
			body.Close()
			return
		}
		m.end(b, err)
	})
}

// request asks for the size, as the profile does, and then for the bytes.
func (m *Manager) request(b *image, address string) (int64, *quiet, error) {
	probe := http.MethodHead
	if !m.since(V1_7) {
		probe = http.MethodGet
	}
	ctx, cancel := context.WithTimeout(m.ctx, m.options.Silence)
	response, err := m.ask(ctx, b, probe, address)
	cancel()
	if err != nil {
		return 0, nil, err
	}
	response.Body.Close()
	size := response.ContentLength

	getting, stop := context.WithCancel(m.ctx)
	timer := time.AfterFunc(m.options.Silence, stop)
	response, err = m.ask(getting, b, http.MethodGet, address)
	if err != nil {
		timer.Stop()
		stop()
		return 0, nil, err
	}
	return size, &quiet{response.Body, timer, m.options.Silence, stop}, nil
}

func (m *Manager) ask(ctx context.Context, b *image, method, address string) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, method, address, nil)
	if err != nil {
		return nil, err
	}
	response, err := m.client.Do(request)
	f := Fetch{Method: method, URL: address}
	if err == nil {
		f.Status = response.StatusCode
	}
	m.mu.Lock()
	if len(b.fetches) < 1000 {
		b.fetches = append(b.fetches, f)
	}
	m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		response.Body.Close()
		return nil, fmt.Errorf("expected status code 200 from %s, got %s", address, response.Status)
	}
	return response, nil
}

// quiet is a body whose silence ends it.
type quiet struct {
	io.ReadCloser
	timer   *time.Timer
	silence time.Duration
	stop    context.CancelFunc
}

func (q *quiet) Read(p []byte) (int, error) {
	n, err := q.ReadCloser.Read(p)
	if n > 0 {
		q.timer.Reset(q.silence)
	}
	return n, err
}

func (q *quiet) Close() error {
	q.timer.Stop()
	q.stop()
	return q.ReadCloser.Close()
}

// take reads the bytes of an image, and judges them. size is -1 if nobody has said it.
func (m *Manager) take(b *image, r io.Reader, size int64) {
	hash := sha512.New()
	var kept bytes.Buffer
	buffer := make([]byte, 256<<10)
	var got int64
	var err error
	for err == nil {
		var n int
		n, err = r.Read(buffer)
		hash.Write(buffer[:n])
		if got += int64(n); got <= m.options.Keep {
			kept.Write(buffer[:n])
		}
		m.mu.Lock()
		if size > 0 {
			b.progress = int(min(100, got*100/size))
		}
		m.mu.Unlock()
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	sum := hex.EncodeToString(hash.Sum(nil))
	switch {
	case err != nil:
	case size >= 0 && got != size:
		err = fmt.Errorf("processed data size %d does not match the expected file size %d", got, size)
	case b.expected != "" && b.expected != sum:
		err = fmt.Errorf("the expected checksum %s doesn't match the file actual checksum %s", b.expected, sum)
	}
	if err == nil {
		m.mu.Lock()
		b.length, b.sum, b.size, b.data = got, sum, got, nil
		if got <= m.options.Keep {
			b.data = kept.Bytes()
		}
		m.mu.Unlock()
	}
	m.end(b, err)
}

// end notes how a download or an upload ended. A download that failed is tried again.
func (m *Manager) end(b *image, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if b.done = true; err == nil {
		b.failures = 0
		return
	}
	b.failing, b.message = true, "failed to process sync file: "+err.Error()
	if b.kind == "download" {
		m.again(b, time.Duration(min(60<<min(b.failures, 8), 300))*m.options.Second)
		b.failures++
	}
}

// again downloads an image anew after a while, if a client has seen by then that it
// failed. The caller holds the lock.
func (m *Manager) again(b *image, after time.Duration) {
	if m.ctx.Err() != nil {
		return
	}
	m.working.Go(func() {
		timer := time.NewTimer(after)
		defer timer.Stop()
		for {
			select {
			case <-m.ctx.Done():
				return
			case <-timer.C:
			}
			m.mu.Lock()
			there := m.images[b.name] == b
			seen := b.step == failed || b.step == cleaned
			if there && seen {
				b.step = waiting
				m.fetch(b)
			}
			m.mu.Unlock()
			if !there || seen {
				return
			}
			timer.Reset(after)
		}
	})
}

// LoseAll loses every copy of an image. One that was downloaded is downloaded again,
// from the same address; another stays lost.
func (m *Manager) LoseAll(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.images[name]
	b.step, b.message, b.data = failed, "the file is lost", nil
	if b.kind == "download" {
		m.again(b, 300*m.options.Second)
	}
}

// SetUnknown has all copies of an image be in the state unknown, or as they are.
func (m *Manager) SetUnknown(name string, unknown bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.images[name].unknown = unknown
}

// Remove deletes an image, as somebody else does, and at once.
func (m *Manager) Remove(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.images, name)
}

// Names are the images there are, without looking at them as a client does.
func (m *Manager) Names() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var names []string
	for name := range m.images {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Content is what an image's file is: its bytes, unless they are more than are kept,
// their number and their SHA-512. ok is false until the file has come.
func (m *Manager) Content(name string) (data []byte, length int64, sum string, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.images[name]
	if b == nil || b.sum == "" {
		return nil, 0, "", false
	}
	return b.data, b.length, b.sum, true
}

// Fetches are the requests that an image's downloads have made.
func (m *Manager) Fetches(name string) []Fetch {
	m.mu.Lock()
	defer m.mu.Unlock()
	if b := m.images[name]; b != nil {
		return slices.Clone(b.fetches)
	}
	return nil
}
