package upstream

import (
	"strings"
	"time"
)

// Standing says of each endpoint, in the order in which they are asked, what it is
// and whether it is being left alone: "https://mirror.corp/v2 (bytes by digest
// only)", "https://ghcr.io/v2 (origin), left alone: …".
func (u *Upstream) Standing() []string {
	var all []string
	for _, e := range u.endpoints {
		var is []string
		if e.origin {
			is = append(is, "origin")
		}
		switch {
		case !e.resolve:
			is = append(is, "bytes by digest only")
		case !e.pull:
			is = append(is, "tags only")
		}
		says := e.name
		if len(is) > 0 {
			says += " (" + strings.Join(is, ", ") + ")"
		}
		if trouble := e.health.trouble(); trouble != "" {
			says += ", left alone: " + trouble
		}
		all = append(all, says)
	}
	return all
}

// trouble is why an endpoint is being left alone, or "".
func (h *health) trouble() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.now()
	switch wait := h.limited.Sub(now); {
	case wait > 0:
		return "it asked for that, for " + wait.Round(time.Second).String()
	case h.failures >= breakerThreshold && h.last != nil:
		return h.last.Error()
	}
	return ""
}
