package module

import (
	"errors"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-registry/mirror/internal/upstream"
)

// metrics shows what every state of the process knows, whichever configuration
// it came with. Each configuration has a registry of its own, and it is
// registered with all of them.
var metrics = new(collector)

type collector struct{}

var (
	rateLimit     = gauge("ratelimit_limit", "Requests that the upstream permits in a window, by its own word.")
	rateRemaining = gauge("ratelimit_remaining", "Requests that were left when the upstream last said so. Absent when a window has passed since.")
	rateWindow    = gauge("ratelimit_window_seconds", "Length of the window that the limit is for; 0 if the upstream does not say.")
	rateExhausted = gauge("ratelimit_exhaustion_timestamp_seconds", "Unix time when no request will be left at the present rate of use, or since when none was. Absent when that is more than a window away.")
)

// gauge describes a series for each upstream, address and account, all of which
// are configured: nothing that a client says becomes a label, but for a
// wildcard's hosts, and those are bounded.
func gauge(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("caddy_registry_upstream_"+name, help, []string{"upstream", "endpoint", "account"}, nil)
}

// registerMetrics makes them part of what a configuration exposes.
func registerMetrics(registry *prometheus.Registry) error {
	err := registry.Register(metrics)
	if _, again := errors.AsType[prometheus.AlreadyRegisteredError](err); again {
		return nil
	}
	return err
}

func (*collector) Describe(descs chan<- *prometheus.Desc) {
	descs <- rateLimit
	descs <- rateRemaining
	descs <- rateWindow
	descs <- rateExhausted
	for _, desc := range []*prometheus.Desc{
		storeAllocated, storeReserved, storePartial, storeMaxSize, storeComplete, storeDamaged,
		storePending, storePendingBytes, storePendingAge, storeNear, storeNearMax, storeUnavailable, storeShared, storeCalls,
		evictedRoots, evictedBlobs, evictedBytes, upstreamBytes, hostedBytes, hostedLimit, upstreamLimit,
		webhookPending, webhookSent, webhookFailed, webhookDropped,
		backingCount, backingVersions, backingBytes, backingRegistrations, backingJobs,
	} {
		descs <- desc
	}
}

func (*collector) Collect(into chan<- prometheus.Metric) {
	collectStores(into)
	// One series may be told of twice: by two stores, or while a reload changes
	// the settings of a connection. The latest word counts.
	type series struct{ upstream, endpoint, account string }
	latest := map[series]upstream.Budget{}
	states.Range(func(_, value any) bool {
		for _, b := range value.(*state).endpoints.Budgets() {
			s := series{label(b.Upstream), label(b.Endpoint), label(b.Account)}
			if known, ok := latest[s]; !ok || known.At.Before(b.At) {
				latest[s] = b
			}
		}
		return true
	})
	for s, b := range latest {
		send := func(desc *prometheus.Desc, value float64) {
			into <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, s.upstream, s.endpoint, s.account)
		}
		send(rateLimit, float64(b.Limit))
		send(rateWindow, b.Window.Seconds())
		if !b.Over {
			send(rateRemaining, float64(b.Remaining))
		}
		if !b.Exhausted.IsZero() {
			send(rateExhausted, float64(b.Exhausted.UnixNano())/float64(time.Second))
		}
	}
}

// label makes of a configured word what Prometheus takes for one: it refuses
// everything else it was to be told, too, for the sake of one bad byte.
func label(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
