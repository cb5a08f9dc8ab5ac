package module

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"unicode/utf8"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/access"
	"github.com/caddy-registry/mirror/internal/oci"
)

// Access says who may do what on a site. Without it anyone may pull what is
// mirrored, and nobody anything that is hosted.
type Access struct {
	// The placeholder that has the name of who asks, as an authenticator in front
	// of this handler sets it; empty means anonymous. Default:
	// `{http.auth.user.id}`.
	Identity string `json:"identity,omitempty"`

	// The first rule that matches decides; what none matches is denied. There is
	// at least one.
	Rules []AccessRule `json:"rules,omitempty"`
}

// AccessRule allows something, or denies it.
type AccessRule struct {
	// `allow` or `deny`.
	Effect string `json:"effect"`

	// `pull`, `push`, `delete`, or `any` for all of them.
	Actions []string `json:"actions"`

	// `anyone`, `authenticated`, `user:<name>`, `net:<cidr>` or
	// `net:private_ranges`. Default: anyone; but what allows push or delete has
	// to say whom.
	To []string `json:"to,omitempty"`

	// Names of repositories as a path of this site has them, as patterns: `*` is
	// one component and `**` any number of them. Default: all.
	On []string `json:"on,omitempty"`
}

// parse is the rule as it is meant, or what is wrong with it.
func (r *AccessRule) parse() (access.Rule, error) {
	rule := access.Rule{Allow: r.Effect == "allow"}
	if !rule.Allow && r.Effect != "deny" {
		return rule, fmt.Errorf("effect %q is neither allow nor deny", r.Effect)
	}
	for _, name := range r.Actions {
		action, err := access.ParseAction(name)
		if err != nil {
			return rule, err
		}
		if rule.Actions&action != 0 {
			return rule, fmt.Errorf("%s is said twice", name)
		}
		rule.Actions |= action
	}
	for _, name := range r.To {
		who, err := access.ParseWho(name)
		if err != nil {
			return rule, err
		}
		rule.To = append(rule.To, who)
	}
	for _, name := range r.On {
		pattern, err := oci.ParsePattern(name)
		if err != nil {
			return rule, err
		}
		rule.On = append(rule.On, pattern)
	}
	return rule, rule.Check()
}

// Check reports what is wrong. A nil Access is right.
func (a *Access) Check() error {
	_, err := a.parse()
	return err
}

// parse are the rules of a site; nil: it has none.
func (a *Access) parse() (access.Rules, error) {
	if a == nil {
		return nil, nil
	}
	if err := a.CheckIdentity(); err != nil {
		return nil, err
	}
	if len(a.Rules) == 0 {
		return nil, errors.New("access: there is no rule, and so nobody could do anything; write `allow pull`, or leave the block out")
	}
	rules := access.Rules{}
	for i := range a.Rules {
		rule, err := a.Rules[i].parse()
		if err != nil {
			return nil, fmt.Errorf("access: rules[%d]: %w", i, err)
		}
		rules = append(rules, rule)
	}
	if err := rules.Check(); err != nil {
		return nil, fmt.Errorf("access: %w", err)
	}
	return rules, nil
}

// CheckIdentity reports what is wrong with the placeholder alone.
func (a *Access) CheckIdentity() error {
	_, err := a.placeholder()
	return err
}

// identity is the default placeholder, without its braces.
const identity = "http.auth.user.id"

// placeholder is that of the identity, without its braces. It is one, alone, and
// of the request: with anything beside it nobody would be anonymous.
func (a *Access) placeholder() (string, error) {
	if a.Identity == "" {
		return identity, nil
	}
	key, opens := strings.CutPrefix(a.Identity, "{")
	key, closes := strings.CutSuffix(key, "}")
	if !opens || !closes || strings.ContainsAny(key, `{}\`) || !strings.HasPrefix(key, "http.") {
		return "", fmt.Errorf("access: identity %.100q is not one placeholder of the request, such as {http.auth.user.id}, and nothing else", a.Identity)
	}
	return key, nil
}

// caller finds out who asks: as an authenticator says, and where from as Caddy
// sees it behind trusted proxies.
func (m *Mirror) caller(r *http.Request) access.Caller {
	var c access.Caller
	if m.identity == "" && m.RedirectToStorage == nil {
		return c
	}
	if m.identity != "" {
		c.Identity, c.Err = m.named(r)
	}
	c.Addr = clientAddr(r)
	return c
}

// clientAddr is where a request comes from, or the zero Addr if nobody knows.
func clientAddr(r *http.Request) netip.Addr {
	ip, _ := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
	addr, _ := netip.ParseAddr(ip)
	return addr
}

// asker is where the name of who asks is found.
type asker struct {
	// identity is the placeholder of who asks, without braces; "": the site has no
	// rules.
	identity    string
	certificate bool // the placeholder is of a client's certificate
}

// asker is that of rules; a nil Access has none.
func (a *Access) asker() (asker, error) {
	if a == nil {
		return asker{}, nil
	}
	identity, err := a.placeholder()
	// Caddy reads the rest of such a placeholder in any case.
	return asker{identity, strings.HasPrefix(strings.ToLower(identity), "http.request.tls.client.")}, err
}

// named is the name that an authenticator gives who asks. What is no name is an
// error, and so lets nobody in.
func (a asker) named(r *http.Request) (string, error) {
	if a.certificate && (r.TLS == nil || len(r.TLS.PeerCertificates) == 0) {
		// Caddy has values for a certificate that is not there: the hash of
		// nothing is a fingerprint.
		return "", nil
	}
	replacer, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return "", errors.New("Caddy has not prepared this request")
	}
	var name string
	switch value, _ := replacer.Get(a.identity); value := value.(type) {
	case nil:
	case string:
		name = value
	case []byte:
		name = string(value)
	case fmt.Stringer:
		name = value.String()
	default:
		return "", fmt.Errorf("{%s} is no name, but %T", a.identity, value)
	}
	if len(name) > access.MaxIdentity || !utf8.ValidString(name) {
		return "", fmt.Errorf("what {%s} says is not UTF-8 of at most %d bytes", a.identity, access.MaxIdentity)
	}
	return name, nil
}

// warn tells of rules that are seldom meant.
func (m *Mirror) warn(rules access.Rules) {
	for _, action := range [...]access.Action{access.Push, access.Delete} {
		if rules.Open(action) {
			m.log.Warn("access: a rule lets everyone who reaches this site write to it", zap.Stringer("action", action))
		}
	}
	if m.Access == nil || !rules.Open(access.Pull) {
		return
	}
	for _, action := range [...]access.Action{access.Pull, access.Push, access.Delete} {
		if rules.Named(action) {
			m.log.Warn("access: anyone may pull here, and other things need a name; docker never logs in at a site whose /v2/ answers without it, and so could not do those. Serve what everyone may pull and what needs a login on two hosts; or, if an authenticator lets nobody reach this site without a name, write `to authenticated` instead of anyone",
				zap.Stringer("needs_a_name", action))
			return
		}
	}
}
