package mirror

import (
	"errors"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/upstream"
	"github.com/caddy-registry/mirror/storage"
)

// A trouble is something to tell the operator of, once a minute.
type trouble struct {
	event string
	whose string // an upstream, a repository, or "": the disk's
}

// Events of [Settings].
const (
	upstreamDown   = "upstream_down"
	upstreamDenied = "upstream_denied"
	rateLimited    = "rate_limited"
	storageFull    = "storage_full"
	digestMismatch = "digest_mismatch"

	// These are logged only.
	diskFailed   = "disk trouble"
	storeMissing = "the store cannot be reached"
)

// tellEvery is how often one trouble is told of.
const tellEvery = time.Minute

// due reports whether it is time to tell of a trouble again.
func (m *Mirror) due(t trouble) bool {
	now := m.now()
	if last, ok := m.told.Get(t); ok && now.Sub(last) < tellEvery {
		return false
	}
	m.told.Add(t, now)
	return true
}

// event emits an event.
func (m *Mirror) event(name string, data map[string]any) {
	emit := m.emit.Load()
	if emit == nil || *emit == nil || !m.begin() {
		return
	}
	// Handlers may take their time, and no client is to wait for them.
	go func() {
		defer m.wg.Done()
		(*emit)(name, data)
	}()
}

// tell logs that an upstream does not answer as it should, with the latest
// request that met it. held says that what was asked for is held: then even a
// refusal that would otherwise mean that there is no such thing is trouble.
func (m *Mirror) tell(t Target, about string, err error, held bool) {
	if t.Upstream == nil {
		return
	}
	var refusal *upstream.Error
	kind := ""
	switch judge(err).situation {
	case noUpstream:
		kind = upstreamDown
	case limited:
		kind = rateLimited
	case deniedUpstream:
		kind = upstreamDenied
	default:
		if !held || !errors.As(err, &refusal) || refusal.Kind != upstream.Unauthorized {
			return
		}
		kind = upstreamDenied
	}
	if !m.due(trouble{kind, t.Upstream.Name}) {
		return
	}
	m.log.Warn("upstream trouble", zap.String("upstream", t.Upstream.Name), zap.String("reference", about), zap.Error(err))
	m.event(kind, map[string]any{"upstream": t.Upstream.Name, "reference": about, "error": err.Error()})
}

// diskTrouble logs that something could not be stored, or asked of the store. The
// client need not suffer from our disk, nor the log.
func (m *Mirror) diskTrouble(doing, about string, err error) {
	what := diskFailed
	if errors.Is(err, storage.ErrUnavailable) {
		what = storeMissing
	}
	if m.due(trouble{what, ""}) {
		m.log.Error(what, zap.String("while", doing), zap.String("reference", about), zap.Error(err))
	}
	if (errors.Is(err, storage.ErrFull) || errors.Is(err, syscall.ENOSPC)) && m.due(trouble{storageFull, ""}) {
		m.event(storageFull, map[string]any{"reference": about, "error": err.Error()})
	}
}
