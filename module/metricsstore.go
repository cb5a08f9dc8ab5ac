package module

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-registry/mirror/storage"
)

// storeSeries describes a series for each store, which are configured.
func storeSeries(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("caddy_registry_"+name, help, append([]string{"store"}, labels...), nil)
}

var (
	storeAllocated = storeSeries("store_allocated_bytes", "Bytes that the store takes on its disk, as far as the catalog knows.")
	storeReserved  = storeSeries("store_reserved_bytes", "Bytes set aside for blobs that are on their way.")
	storePartial   = storeSeries("store_partial_bytes", "Bytes of blobs that are not whole yet.")
	storeMaxSize   = storeSeries("store_max_size_bytes", "The option max_size of the store. Absent without one.")
	storeComplete  = storeSeries("store_catalog_complete", "1 if the catalog has everything in the store; 0 while it is made again, and nothing is evicted.")
	storeDamaged   = storeSeries("store_damaged_blobs", "Blobs found damaged that cannot be fetched again.")

	storePending      = storeSeries("store_pending_uploads", "Values that wait to be taken to the bucket. This and the next seven only of stores in one.")
	storePendingBytes = storeSeries("store_pending_upload_bytes", "Bytes that wait to be taken to the bucket.")
	storePendingAge   = storeSeries("store_pending_upload_age_seconds", "How long the oldest of them has waited; 0 if none does.")
	storeNear         = storeSeries("store_near_bytes", "Bytes of the store that are on the local disk, cached or waiting.")
	storeNearMax      = storeSeries("store_near_max_size_bytes", "How many there may be. Absent without a limit.")
	storeUnavailable  = storeSeries("store_unavailable", "1 if the bucket cannot be reached or refuses to answer.")
	storeShared       = storeSeries("store_shared", "1 if another process uses the store, and nothing is deleted.")
	storeCalls        = storeSeries("store_calls_total", "What the bucket was asked for, by operation and outcome: answered, or failed without a useful answer.", "operation", "outcome")

	evictedRoots   = storeSeries("evicted_images_total", "Tags and untagged manifests evicted.")
	evictedBlobs   = storeSeries("evicted_blobs_total", "Blobs evicted.")
	evictedBytes   = storeSeries("evicted_bytes_total", "Bytes freed by eviction.")
	upstreamBytes  = storeSeries("upstream_allocated_bytes", "Bytes that the repositories of an upstream take. Only of upstreams with a max_size or a ttl.", "upstream")
	webhookPending = storeSeries("webhook_pending", "Events that wait for a webhook.", "webhook")
	webhookSent    = storeSeries("webhook_delivered_total", "Events that a webhook has taken.", "webhook")
	webhookFailed  = storeSeries("webhook_failed_total", "Attempts to send a webhook an event that have failed.", "webhook")
	webhookDropped = storeSeries("webhook_dropped_total", "Events for a webhook that were lost, since its queue was full or damaged.", "webhook")
	hostedBytes    = storeSeries("hosted_allocated_bytes", "Bytes that the repositories of a hosted pattern take, with what is on its way to them. Only of patterns with a max_size.", "pattern")
	hostedLimit    = storeSeries("hosted_max_size_bytes", "The option max_size of a hosted pattern.", "pattern")
	upstreamLimit  = storeSeries("upstream_max_size_bytes", "The option max_size of an upstream. Absent without one.", "upstream")
)

// statusPatience bounds what a scrape waits for a catalog.
const statusPatience = 5 * time.Second

func collectStores(into chan<- prometheus.Metric) {
	// Outside Range, which would hold up whoever loads a configuration.
	var open []*state
	states.Range(func(_, value any) bool {
		if s := value.(*state); s.works.Load() != nil && s.enter() {
			open = append(open, s)
		}
		return true
	})
	for _, s := range open {
		s.collect(into)
		s.leave()
	}
}

func (s *state) collect(into chan<- prometheus.Metric) {
	send := func(desc *prometheus.Desc, kind prometheus.ValueType, value int64, labels ...string) {
		into <- prometheus.MustNewConstMetric(desc, kind, float64(value), append([]string{label(s.identity)}, labels...)...)
	}
	for _, webhook := range s.works.Load().sender.Status() {
		send(webhookPending, prometheus.GaugeValue, int64(webhook.Pending), webhook.Name)
		send(webhookSent, prometheus.CounterValue, webhook.Delivered, webhook.Name)
		send(webhookFailed, prometheus.CounterValue, webhook.Failed, webhook.Name)
		send(webhookDropped, prometheus.CounterValue, webhook.Dropped, webhook.Name)
	}
	if b, ok := s.works.Load().keeper.Backlog(); ok {
		collectBacklog(b, s.works.Load().keeper.Off() != "", send)
	}
	ctx, cancel := context.WithTimeout(context.Background(), statusPatience)
	defer cancel()
	s.collectBacking(ctx, send)
	kept, err := s.works.Load().keeper.Status(ctx)
	if err != nil {
		return // the log tells of a catalog that fails
	}
	complete := int64(0)
	if !kept.Complete.IsZero() {
		complete = 1
	}
	send(storeAllocated, prometheus.GaugeValue, kept.Usage.Allocated)
	send(storeReserved, prometheus.GaugeValue, kept.Reserved)
	send(storePartial, prometheus.GaugeValue, kept.Partial)
	send(storeComplete, prometheus.GaugeValue, complete)
	send(storeDamaged, prometheus.GaugeValue, int64(len(kept.Damaged)))
	send(evictedRoots, prometheus.CounterValue, kept.Evicted.Roots)
	send(evictedBlobs, prometheus.CounterValue, kept.Evicted.Blobs)
	send(evictedBytes, prometheus.CounterValue, kept.Evicted.Bytes)
	if kept.MaxSize > 0 {
		send(storeMaxSize, prometheus.GaugeValue, kept.MaxSize)
	}
	for _, used := range kept.Hosted {
		send(hostedBytes, prometheus.GaugeValue, used.Bytes, label(used.Pattern))
		send(hostedLimit, prometheus.GaugeValue, used.MaxSize, label(used.Pattern))
	}
	for name, used := range kept.Upstreams {
		send(upstreamBytes, prometheus.GaugeValue, used.Bytes, label(name))
		if used.MaxSize > 0 {
			send(upstreamLimit, prometheus.GaugeValue, used.MaxSize, label(name))
		}
	}
}

func collectBacklog(b storage.Backlog, shared bool, send func(desc *prometheus.Desc, kind prometheus.ValueType, value int64, labels ...string)) {
	is := func(yes bool) int64 {
		if yes {
			return 1
		}
		return 0
	}
	age := time.Duration(0)
	if !b.Oldest.IsZero() {
		age = max(time.Since(b.Oldest), 0)
	}
	send(storePending, prometheus.GaugeValue, b.Pending)
	send(storePendingBytes, prometheus.GaugeValue, b.PendingBytes)
	send(storePendingAge, prometheus.GaugeValue, int64(age/time.Second))
	send(storeNear, prometheus.GaugeValue, b.NearBytes)
	if b.CacheBytes > 0 {
		send(storeNearMax, prometheus.GaugeValue, b.CacheBytes)
	}
	send(storeUnavailable, prometheus.GaugeValue, is(b.Err != nil))
	send(storeShared, prometheus.GaugeValue, is(shared))
	// Few, and none of them of a client's making.
	for operation, n := range b.Calls {
		failed := min(b.Failed[operation], n)
		send(storeCalls, prometheus.CounterValue, n-failed, label(operation), "answered")
		send(storeCalls, prometheus.CounterValue, failed, label(operation), "failed")
	}
}
