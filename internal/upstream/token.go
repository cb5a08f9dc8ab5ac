package upstream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/docker/distribution/registry/client/auth/challenge"
	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/singleflight"
)

const (
	maxTokenAnswer = 1 << 20
	maxTokens      = 4096
	clientID       = "caddy-registry"
	refusalMemory  = 30 * time.Second
	tokenTimeout   = 20 * time.Second
)

// Credentials are a user and his secret at one endpoint. The zero value is
// nobody.
type Credentials struct{ User, Secret string }

// identityToken reports a secret that is a refresh token rather than a
// password: Docker's convention, and Azure's.
func (c Credentials) identityToken() bool {
	return c.User == "<token>" || c.User == "00000000-0000-0000-0000-000000000000"
}

// tokens does the token dance of one endpoint (distribution, docs/spec/auth):
// it answers challenges, keeps tokens until shortly before they end, renews
// those in use early and behind the requests, and never asks twice at once for
// the same one.
type tokens struct {
	credentials Credentials
	transports  *transports
	now         func() time.Time

	cache   *lru.Cache[string, token] // by realm and scope
	flights singleflight.Group

	mu sync.Mutex
	// last is the latest challenge, and the repository path it was for. The
	// registry will say the same of another repository, so we need not be
	// refused once for each.
	last     *url.URL // of the token request; nil: none seen
	lastPath string
	basic    bool // it wants Basic
	// A refusal of our credentials is remembered for a while, because some
	// registries lock an account after a few of them. So is a 429, for as long
	// as it asks for.
	refused      *Error
	refusedUntil time.Time
}

type token struct {
	value          string
	renew, expires time.Time
}

func newTokens(c Credentials, t *transports, now func() time.Time) *tokens {
	cache, _ := lru.New[string, token](maxTokens) // fails only for a size below 1
	return &tokens{credentials: c, transports: t, now: now, cache: cache}
}

// authorization is the header for a request about a repository path, or ""
// as long as the endpoint has not asked for one.
func (t *tokens) authorization(ctx context.Context, path string) (string, error) {
	t.mu.Lock()
	basic, last, lastPath := t.basic, t.last, t.lastPath
	t.mu.Unlock()
	switch {
	case basic:
		return t.basicHeader(), nil
	case last == nil:
		return "", nil
	}
	return t.bearer(ctx, retarget(last, lastPath, path))
}

// answer reacts to a 401. It returns the header to try again with. stale is
// the header that was refused.
func (t *tokens) answer(ctx context.Context, challenges []challenge.Challenge, path, stale string) (string, error) {
	var basic bool
	for _, c := range challenges {
		switch c.Scheme {
		case "bearer":
			request, err := t.request(c.Parameters, path)
			if err != nil {
				return "", err
			}
			t.mu.Lock()
			t.last, t.lastPath, t.basic = request, path, false
			t.mu.Unlock()
			if held, ok := t.cache.Peek(request.String()); ok && "Bearer "+held.value == stale {
				t.cache.Remove(request.String())
			}
			return t.bearer(ctx, request)
		case "basic":
			basic = true
		}
	}
	if !basic {
		return "", &Error{Kind: Unauthorized, Status: http.StatusUnauthorized, Reason: "it asks for authentication of a kind unknown here"}
	}
	header := t.basicHeader()
	if header == "" {
		return "", &Error{Kind: Unauthorized, Status: http.StatusUnauthorized, Reason: "it wants a user and a password; configure credentials"}
	}
	if header == stale {
		return "", &Error{Kind: Denied, Status: http.StatusUnauthorized, Reason: "it refused the configured credentials"}
	}
	t.mu.Lock()
	t.basic = true
	t.mu.Unlock()
	return header, nil
}

func (t *tokens) basicHeader() string {
	if t.credentials == (Credentials{}) {
		return ""
	}
	r := http.Request{Header: http.Header{}}
	r.SetBasicAuth(t.credentials.User, t.credentials.Secret)
	return r.Header.Get("Authorization")
}

// request makes the address of the token request out of a Bearer challenge.
func (t *tokens) request(params map[string]string, path string) (*url.URL, error) {
	realm, err := url.Parse(params["realm"])
	if err != nil || realm.Host == "" {
		return nil, &Error{Kind: Invalid, Reason: fmt.Sprintf("its token realm %.200q is not an address", params["realm"])}
	}
	// nvcr.io has the scope in the realm's own query.
	query := realm.Query()
	if service := params["service"]; service != "" {
		query.Set("service", service)
	}
	for scope := range strings.FieldsSeq(params["scope"]) {
		if !slices.Contains(query["scope"], scope) {
			query.Add("scope", scope)
		}
	}
	if query.Get("scope") == "" && path != "" {
		query.Set("scope", "repository:"+path+":pull")
	}
	realm.RawQuery, realm.Fragment = query.Encode(), ""
	return realm, nil
}

// retarget turns a token request for one repository into that for another. A
// scope that names no repository, such as public.ecr.aws's "aws", stays.
func retarget(request *url.URL, from, to string) *url.URL {
	if from == to {
		return request
	}
	query := request.Query()
	for i, scope := range query["scope"] {
		if rest, ok := strings.CutPrefix(scope, "repository:"+from+":"); ok && from != "" {
			query["scope"][i] = "repository:" + to + ":" + rest
		}
	}
	copied := *request
	copied.RawQuery = query.Encode()
	return &copied
}

// bearer returns the header with a token for the request, from the cache if
// possible.
func (t *tokens) bearer(ctx context.Context, request *url.URL) (string, error) {
	key := request.String()
	now := t.now()
	if held, ok := t.cache.Get(key); ok && now.Before(held.expires) {
		if now.After(held.renew) {
			// Not more often than every tenth of what is left of it.
			held.renew = now.Add(held.expires.Sub(now) / 10)
			t.cache.Add(key, held)
			t.flights.DoChan(key, func() (any, error) { return t.fetch(request) })
		}
		return "Bearer " + held.value, nil
	}
	select {
	case result := <-t.flights.DoChan(key, func() (any, error) { return t.fetch(request) }):
		if result.Err != nil {
			return "", result.Err
		}
		return "Bearer " + result.Val.(token).value, nil
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// fetch asks the token server, for everyone who waits. The context is
// nobody's in particular.
func (t *tokens) fetch(request *url.URL) (any, error) {
	t.mu.Lock()
	refused, until := t.refused, t.refusedUntil
	t.mu.Unlock()
	start := t.now()
	if refused != nil && start.Before(until) {
		again := *refused
		if again.Kind == RateLimited {
			again.After = until.Sub(start)
		}
		return nil, &again
	}
	withCredentials := t.credentials != (Credentials{})
	if err := t.transports.guard.checkRealm(request, withCredentials); err != nil {
		return nil, &Error{Kind: Refused, Err: err}
	}
	ctx, cancel := context.WithTimeout(context.Background(), tokenTimeout)
	defer cancel()
	var status int
	var header http.Header
	var body []byte
	var err error
	if t.credentials.identityToken() {
		status, header, body, err = t.post(ctx, request)
	}
	if err == nil && (status == 0 || status == http.StatusNotFound || status == http.StatusMethodNotAllowed) {
		status, header, body, err = t.get(ctx, request)
	}
	if err != nil {
		kind := Unavailable
		if errors.Is(err, ErrGuard) {
			kind = Refused
		}
		return nil, &Error{Kind: kind, Reason: "its token server " + request.Host, Err: err}
	}
	problem := &Error{Status: status, Reason: "its token server " + request.Host + " answers so" + theirWords(body)}
	switch {
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		problem.Kind = Unauthorized
		if withCredentials {
			problem.Kind = Denied
			problem.Reason += "; check the configured credentials"
			t.mu.Lock()
			t.refused, t.refusedUntil = problem, start.Add(refusalMemory)
			t.mu.Unlock()
		}
		return nil, problem
	case status == http.StatusTooManyRequests:
		problem.Kind = RateLimited
		wait, ok := retryAfter(header, start)
		if !ok {
			wait = defaultBlock
		}
		problem.After = min(wait, longestBlock)
		t.mu.Lock()
		t.refused, t.refusedUntil = problem, start.Add(problem.After)
		t.mu.Unlock()
		return nil, problem
	case status != http.StatusOK:
		return nil, problem
	}
	var reply struct {
		Token       string  `json:"token"`
		AccessToken string  `json:"access_token"`
		ExpiresIn   float64 `json:"expires_in"`
	}
	if err := json.Unmarshal(body, &reply); err != nil {
		return nil, &Error{Kind: Invalid, Reason: "its token server " + request.Host + " sends no JSON", Err: err}
	}
	got := token{value: reply.Token}
	if got.value == "" {
		got.value = reply.AccessToken
	}
	if got.value == "" || strings.ContainsAny(got.value, "\r\n\x00") {
		return nil, &Error{Kind: Invalid, Reason: "its token server " + request.Host + " sends no token"}
	}
	life := time.Minute // what the specification says where expires_in is absent
	if reply.ExpiresIn > 0 {
		life = time.Duration(min(reply.ExpiresIn, 86400) * float64(time.Second))
	}
	got.expires = start.Add(life - min(life/4, 10*time.Second))
	got.renew = start.Add(life/2 + rand.N(life/4+1))
	t.cache.Add(request.String(), got)
	t.mu.Lock()
	t.refused = nil
	t.mu.Unlock()
	return got, nil
}

func (t *tokens) get(ctx context.Context, request *url.URL) (int, http.Header, []byte, error) {
	query := request.Query()
	query.Set("client_id", clientID)
	if t.credentials.User != "" && !t.credentials.identityToken() {
		query.Set("account", t.credentials.User)
	}
	target := *request
	target.RawQuery = query.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return 0, nil, nil, err
	}
	if header := t.basicHeader(); header != "" {
		req.Header.Set("Authorization", header)
	}
	return t.send(req)
}

// post is the OAuth2 form, which takes a refresh token.
func (t *tokens) post(ctx context.Context, request *url.URL) (int, http.Header, []byte, error) {
	query := request.Query()
	form := url.Values{
		"grant_type":    {"refresh_token"},
		"refresh_token": {t.credentials.Secret},
		"service":       {query.Get("service")},
		"client_id":     {clientID},
		"scope":         {strings.Join(query["scope"], " ")},
	}
	target := *request
	target.RawQuery = ""
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target.String(), strings.NewReader(form.Encode()))
	if err != nil {
		return 0, nil, nil, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	return t.send(req)
}

func (t *tokens) send(req *http.Request) (int, http.Header, []byte, error) {
	req.Header.Set("User-Agent", userAgent)
	resp, err := t.transports.roundTrip(req)
	if err != nil {
		return 0, nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxTokenAnswer+1))
	if err == nil && len(body) > maxTokenAnswer {
		err = fmt.Errorf("an answer of more than %d bytes", maxTokenAnswer)
	}
	return resp.StatusCode, resp.Header, body, err
}
