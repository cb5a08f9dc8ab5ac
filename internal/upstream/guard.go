package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/publicsuffix"
)

// A guard decides where an upstream may send us. What the operator wrote
// (endpoints, proxies) is trusted as written. What is derived from an
// upstream's words (a token realm, a redirect, a Link) could be an attempt to
// reach the machine's own network through us, or to be given credentials.
type guard struct {
	base          *url.URL // the endpoint, as the operator wrote it
	allowPrivate  bool
	trustNetworks []netip.Prefix
	// strict refuses what nobody may reach through us, whatever is allowed.
	strict bool
}

// ErrGuard is wrapped by what a guard refuses.
var ErrGuard = errors.New("refused")

// trusts reports a target that is the endpoint itself: same scheme, host and
// port.
func (g *guard) trusts(target *url.URL) bool {
	return target.Scheme == g.base.Scheme && hostPort(target) == hostPort(g.base)
}

// check looks at a derived target before anything is sent. Addresses behind
// names are looked at again when they are dialled; a proxy dials for us, so
// then the name is judged here.
func (g *guard) check(ctx context.Context, target *url.URL, proxied bool) error {
	if g.trusts(target) {
		return nil
	}
	switch {
	case target.Scheme == "https":
	case target.Scheme == "http" && g.allowPrivate && g.base.Scheme == "http":
	default:
		return fmt.Errorf("%w: %s://%s is not https", ErrGuard, target.Scheme, target.Host)
	}
	return g.checkHost(ctx, target, proxied)
}

// checkHost is check without regard to the scheme.
func (g *guard) checkHost(ctx context.Context, target *url.URL, proxied bool) error {
	if target.User != nil || target.Hostname() == "" {
		return fmt.Errorf("%w: an address with user information, or without a host", ErrGuard)
	}
	host := strings.TrimSuffix(target.Hostname(), ".")
	if ip, err := netip.ParseAddr(host); err == nil {
		return g.checkAddr(ip)
	}
	if numeric(host) {
		return fmt.Errorf("%w: %s is an address in disguise", ErrGuard, host)
	}
	if !proxied || g.allowPrivate && !g.strict {
		return nil
	}
	if !g.allowPrivate && privateName(host) {
		return fmt.Errorf("%w: %s is a name of a private network; allow_private permits it", ErrGuard, host)
	}
	// The proxy resolves the name. What this machine can resolve is checked;
	// what it cannot, it has no private answer for.
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil
	}
	for _, ip := range addrs {
		if err := g.checkAddr(ip); err != nil {
			return err
		}
	}
	return nil
}

// control is the dial-time check, after the name has been resolved.
func (g *guard) control(_, address string, _ syscall.RawConn) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("%w: %s is not an address", ErrGuard, address)
	}
	return g.checkAddr(at.Addr())
}

func (g *guard) checkAddr(ip netip.Addr) error {
	ip = ip.Unmap().WithZone("")
	if g.strict && never(ip) {
		return fmt.Errorf("%w: nothing is fetched from %s, where machines are asked about themselves", ErrGuard, ip)
	}
	if g.allowPrivate || public(ip) || slices.ContainsFunc(g.trustNetworks, func(p netip.Prefix) bool { return p.Contains(ip) }) {
		return nil
	}
	return fmt.Errorf("%w: %s is not a public address; allow_private or trust_networks permit it", ErrGuard, ip)
}

// Ranges whose addresses lead to an IPv4 address.
var (
	compatible = netip.MustParsePrefix("::/96")
	nat64      = netip.MustParsePrefix("64:ff9b::/96")
	sixToFour  = netip.MustParsePrefix("2002::/16")
)

// special are ranges that netip calls global unicast and that still lead
// inside, or carry another address inside them.
var special = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"), // carrier-grade NAT; some clouds' metadata
	netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("240.0.0.0/4"),
	compatible,
	nat64,
	netip.MustParsePrefix("64:ff9b:1::/48"),
	netip.MustParsePrefix("2001::/32"), // Teredo
	sixToFour,
	netip.MustParsePrefix("fec0::/10"),
}

func public(ip netip.Addr) bool {
	return ip.IsGlobalUnicast() && !ip.IsPrivate() &&
		!slices.ContainsFunc(special, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// numeric reports what inet_aton, and so many a proxy, takes for an IPv4
// address though netip does not: 127.1, 0x7f.0.0.1. No name ends in a number.
func numeric(host string) bool {
	last := strings.ToLower(host[strings.LastIndexByte(host, '.')+1:])
	if hex, ok := strings.CutPrefix(last, "0x"); ok {
		return strings.Trim(hex, "0123456789abcdef") == ""
	}
	return strings.Trim(last, "0123456789") == ""
}

// privateName reports names that public DNS does not have.
func privateName(host string) bool {
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	if !strings.Contains(host, ".") {
		return true
	}
	for _, suffix := range []string{".localhost", ".local", ".localdomain", ".internal", ".intranet", ".lan", ".home", ".corp", ".home.arpa"} {
		if strings.HasSuffix(host, suffix) {
			return true
		}
	}
	return false
}

// foreignRealms are token servers on another registrable domain than their
// registry.
var foreignRealms = map[string]string{
	"lscr.io": "ghcr.io",
	"dhi.io":  "auth.docker.io",
}

// checkRealm decides whether a token server may be asked, and in particular
// given our credentials (CVE-2026-33540: a registry that names somebody else's
// realm gets them).
func (g *guard) checkRealm(realm *url.URL, withCredentials bool) error {
	if !withCredentials {
		return nil
	}
	ours, theirs := strings.ToLower(g.base.Hostname()), strings.ToLower(realm.Hostname())
	if ours == theirs || foreignRealms[ours] == theirs {
		return nil
	}
	if _, err := netip.ParseAddr(ours); err != nil {
		a, errA := publicsuffix.EffectiveTLDPlusOne(ours)
		b, errB := publicsuffix.EffectiveTLDPlusOne(theirs)
		if errA == nil && errB == nil && a == b {
			return nil
		}
	}
	return fmt.Errorf("%w: the token server %s belongs to another domain than %s, and will not be given its credentials", ErrGuard, theirs, ours)
}

// hostPort is the host in lower case with the port written out.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = "443"
		if u.Scheme == "http" {
			port = "80"
		}
	}
	return net.JoinHostPort(strings.ToLower(u.Hostname()), port)
}

// transports are the ways out of one endpoint.
type transports struct {
	guard *guard
	proxy func(*http.Request) (*url.URL, error)
	// direct goes where the operator pointed, and through the proxy he named.
	direct *http.Transport
	// guarded dials derived targets itself, and looks at each address.
	guarded *http.Transport
	// retired is set when no configuration has the endpoint any more. What is
	// still under way leaves no idle connection behind.
	retired atomic.Bool
}

// roundTrip sends a request by the way its target calls for. It follows no
// redirect.
func (t *transports) roundTrip(req *http.Request) (*http.Response, error) {
	req.Close = t.retired.Load()
	if t.guard.trusts(req.URL) {
		return t.direct.RoundTrip(req)
	}
	proxy, err := t.proxy(req)
	if err != nil {
		return nil, err
	}
	if err := t.guard.check(req.Context(), req.URL, proxy != nil); err != nil {
		return nil, err
	}
	if proxy != nil {
		return t.direct.RoundTrip(req)
	}
	return t.guarded.RoundTrip(req)
}

func (t *transports) retire() {
	t.retired.Store(true)
	t.direct.CloseIdleConnections()
	t.guarded.CloseIdleConnections()
}

// A Guard looks at addresses that were named by somebody who need not be the operator,
// so that nobody reaches the machine's own network through us. Private addresses are
// refused unless they are allowed; those of this link, and those where clouds tell
// machines their secrets, always. What it refuses wraps [ErrGuard].
type Guard struct{ guard guard }

// NewGuard returns a guard.
func NewGuard(allowPrivate bool) *Guard {
	return &Guard{guard{base: &url.URL{}, allowPrivate: allowPrivate, strict: true}}
}

// Check looks at a target before anything is sent. proxied says that a proxy will dial
// it: then its name is judged here.
func (g *Guard) Check(ctx context.Context, target *url.URL, proxied bool) error {
	return g.guard.checkHost(ctx, target, proxied)
}

// Control is for a net.Dialer: it looks at an address that is dialled.
func (g *Guard) Control(network, address string, c syscall.RawConn) error {
	return g.guard.control(network, address, c)
}

// metadata are addresses beside the link-local ones where clouds tell machines about
// themselves.
var metadata = []netip.Addr{
	netip.MustParseAddr("100.100.100.200"), // Alibaba
	netip.MustParseAddr("192.0.0.192"),     // Oracle
	netip.MustParseAddr("168.63.129.16"),   // Azure
	netip.MustParseAddr("fd00:ec2::254"),   // AWS
	netip.MustParseAddr("fd20:ce::254"),    // Google
}

// never reports addresses that nobody has a file at.
func never(ip netip.Addr) bool {
	if inner, ok := embedded(ip); ok && never(inner) {
		return true
	}
	return ip.IsLinkLocalUnicast() || ip.IsMulticast() || ip.IsUnspecified() || slices.Contains(metadata, ip)
}

// embedded is the IPv4 address that an IPv6 address leads to: NAT64 (RFC 6052), 6to4
// (RFC 3056), or IPv4-compatible.
func embedded(ip netip.Addr) (netip.Addr, bool) {
	b := ip.As16()
	switch {
	case !ip.Is6() || ip.IsLoopback() || ip.IsUnspecified():
	case compatible.Contains(ip), nat64.Contains(ip):
		return netip.AddrFrom4([4]byte(b[12:])), true
	case sixToFour.Contains(ip):
		return netip.AddrFrom4([4]byte(b[2:6])), true
	}
	return netip.Addr{}, false
}
