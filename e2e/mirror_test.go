//go:build e2e

package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddy-registry/mirror/internal/regtest"
)

// deadAddr is where every client believes the true registry to be: nothing
// listens there, so a pull that succeeds came from the mirror.
const deadAddr = "127.0.0.1:9"

// A mirror is the product at work.
type mirror struct {
	*process
	addr   string
	config string // its Caddyfile
	store  string // its directory
}

// A setup is what the tests vary in a mirror's configuration.
type setup struct {
	addr     string // default: a free one
	admin    string // default: off
	store    string // default: a new directory
	storage  string // options of the storage
	backend  string // another storage than that directory, whole
	options  string // of Caddy
	registry string // of the registry app
	site     string // of the mirror in its site
	server   string // of the site itself
	sites    string // more of them
}

func (s setup) caddyfile() string {
	if s.backend == "" {
		s.backend = fmt.Sprintf("storage disk %s {\n%s\n}", s.store, s.storage)
	}
	return fmt.Sprintf(`{
	admin %s
	%s
	registry {
		%s
		%s
	}
}

http://%s {
	bind 127.0.0.1
	%s
	registry_mirror {
		%s
	}
}
%s
`, s.admin, s.options, s.backend, s.registry, s.addr, s.server, s.site, s.sites)
}

// startMirror starts a mirror that answers on loopback.
func startMirror(t *testing.T, s setup) *mirror {
	t.Helper()
	if s.addr == "" {
		s.addr = regtest.FreeAddress(t)
	}
	if s.admin == "" {
		s.admin = "off"
	}
	if s.store == "" {
		s.store = workDir(t)
	}
	if !strings.Contains(s.storage, "min_free") {
		// Not the default, a tenth: no test is about how full the machine's disk is.
		s.storage += "\nmin_free 1%"
	}
	home := workDir(t)
	m := &mirror{addr: s.addr, store: s.store}
	m.config = writeFile(t, filepath.Join(home, "Caddyfile"), s.caddyfile())
	m.process = start(t, bare(home), caddyBin, "run", "--config", m.config, "--adapter", "caddyfile")
	m.untilReady(t, answers(m.addr))
	return m
}

// dockerHub is the configuration of an upstream docker.io whose origin is at
// the address. Its tags are checked at every pull.
func dockerHub(addr string, more ...string) string {
	text := "upstream docker.io {\n origin http://" + addr + "\n tag_ttl 0s\n"
	for _, option := range more {
		text += " " + option + "\n"
	}
	return text + "}\n"
}
