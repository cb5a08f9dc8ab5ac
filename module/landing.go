package module

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"net/http"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"golang.org/x/text/language"

	"github.com/caddy-registry/mirror/internal/clients"
	"github.com/caddy-registry/mirror/internal/mirror"
)

//go:embed landing.html
var landingHTML string

//go:embed landing.css
var landingCSS string

//go:embed landing.js
var landingJS string

var (
	landing = template.Must(template.New("landing").Parse(landingHTML))

	// landingPolicy lets a browser use what the page has and nothing else.
	landingPolicy = fmt.Sprintf("default-src 'none'; style-src '%s'; script-src '%s'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
		source(landingCSS), source(landingJS))

	languages     = []string{"en", "zh"}
	languageMatch = language.NewMatcher([]language.Tag{language.English, language.Chinese})
)

func source(text string) string {
	sum := sha256.Sum256([]byte(text))
	return "sha256-" + base64.StdEncoding.EncodeToString(sum[:])
}

// land answers `/` of a site where no other handler does, with how clients are set up
// to use this very host.
func (m *Mirror) land(w http.ResponseWriter, r *http.Request) error {
	original, _ := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request)
	if unhandled, _ := caddyhttp.GetVar(r.Context(), "unhandled").(bool); !unhandled || r.URL.Path != "/" ||
		original.URL != nil && original.URL.Path != "/" || r.Method != http.MethodGet && r.Method != http.MethodHead {
		return nil
	}
	page, err := m.page(r)
	if err != nil {
		return nil // a host that is none
	}
	caddyhttp.SetVar(r.Context(), "unhandled", false)
	header := w.Header()
	header.Set("Content-Type", "text/html; charset=utf-8")
	header.Set("Content-Security-Policy", landingPolicy)
	header.Set("Referrer-Policy", "no-referrer")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Cache-Control", "no-cache")
	header.Add("Vary", "Accept-Language")
	header.Set("Content-Length", fmt.Sprint(len(page)))
	if r.Method == http.MethodHead {
		return nil
	}
	_, err = w.Write(page)
	return err
}

// A landed is what the page shows.
type landed struct {
	Language, Host, Intro, Closed                  string
	ByNameTitle, ByName, ClientsTitle, ClientsText string
	Copy, Copied                                   string
	Registries, Names                              []string
	Clients                                        []landedClient
	Style                                          template.CSS
	Script                                         template.JS
}

type landedClient struct {
	ID, Name string
	Steps    []landedStep
}

type landedStep struct{ Text, File, Code string }

func (m *Mirror) page(r *http.Request) ([]byte, error) {
	serves := m.site.Serves()
	is := clients.Mirror{URL: address(r), Default: serves.Default, Every: serves.Every, NoNS: !serves.NS}
	page := landed{Language: preferred(r), Host: strings.TrimPrefix(strings.TrimPrefix(is.URL, "https://"), "http://"), Style: template.CSS(landingCSS), Script: template.JS(landingJS)}
	for _, u := range serves.Registries {
		is.Registries = append(is.Registries, clients.Registry{Name: u.Name, Path: u.PathName})
		page.Registries = append(page.Registries, u.Name)
	}
	for _, c := range clients.All {
		steps, err := c.Steps(is)
		if err != nil {
			continue // it cannot use this site
		}
		shown := landedClient{ID: c.ID, Name: c.Name.In(page.Language)}
		for _, s := range steps {
			shown.Steps = append(shown.Steps, landedStep{s.Text.In(page.Language), s.File, s.Content + s.Commands})
		}
		page.Clients = append(page.Clients, shown)
	}
	if page.Host == "" || !clients.PlainHost(page.Host) || len(page.Clients) == 0 && len(page.Registries) > 0 {
		return nil, fmt.Errorf("%q is no host", r.Host)
	}
	page.say(serves, strings.HasPrefix(is.URL, "http:"), m.closed)
	var b bytes.Buffer
	err := landing.Execute(&b, page)
	return b.Bytes(), err
}

// say sets the sentences of the page.
func (p *landed) say(serves mirror.Serves, plain, closed bool) {
	text := func(english, chinese string) string {
		return clients.Text{English: english, Chinese: chinese}.In(p.Language)
	}
	p.Copy, p.Copied = text("Copy", "复制"), text("Copied", "已复制")
	p.ByNameTitle, p.ClientsTitle = text("By name", "按名称拉取"), text("Set up a client", "配置客户端")
	p.ClientsText = text(
		"With these settings images keep their names, and come from here.",
		"完成以下设置后，镜像名保持不变，并从本站拉取。")
	p.Intro = text("This is a mirror of container registries.", "这是容器镜像仓库的镜像站。")
	switch {
	case serves.Hosted && len(p.Registries) > 0:
		p.Intro = text("This is a mirror of container registries, and has images of its own.", "这是容器镜像仓库的镜像站，也托管自己的镜像。")
	case serves.Hosted:
		p.Intro = text("This is a container registry.", "这是容器镜像仓库。")
	}
	if closed {
		p.Closed = text(
			"Not everybody may pull here. docker sends a mirror no credentials; pull by name, after docker login.",
			"并非所有人都能从本站拉取。docker 不会向镜像站发送凭据；请先执行 docker login，再按名称拉取。")
	}
	p.ByName = text("Any client can pull by the name of this host, without settings.", "任何客户端都可以直接用本站主机名拉取，无需设置。")
	if plain {
		p.ByName = text(
			"Any client can pull by the name of this host, once it is told that the host has no TLS: docker by insecure-registries in /etc/docker/daemon.json, podman by --tls-verify=false.",
			"任何客户端都可以直接用本站主机名拉取，但需先声明本站不使用 TLS:docker 在 /etc/docker/daemon.json 中设置 insecure-registries,podman 使用 --tls-verify=false。")
	}
	for _, u := range serves.Registries[:min(2, len(serves.Registries))] {
		image := "<image>"
		if u.Name == "docker.io" {
			image = "library/alpine:3"
		}
		p.Names = append(p.Names, "docker pull "+p.Host+"/"+u.PathName+"/"+image+"\n")
	}
	if serves.Hosted {
		p.Names = append(p.Names, "docker login "+p.Host+"\n", "docker push "+p.Host+"/<image>\n")
	}
}

// address is how the client has reached this site, as far as a proxy that is trusted
// says.
func address(r *http.Request) string {
	scheme, host := "http", r.Host
	if r.TLS != nil {
		scheme = "https"
	}
	if trusted, _ := caddyhttp.GetVar(r.Context(), caddyhttp.TrustedProxyVarKey).(bool); trusted {
		if proto := r.Header.Get("X-Forwarded-Proto"); proto == "https" || proto == "http" {
			scheme = proto
		}
		if forwarded := r.Header.Get("X-Forwarded-Host"); forwarded != "" {
			host = forwarded
		}
	}
	return scheme + "://" + host
}

// preferred is the language of the page: that of the query, or what the browser prefers.
func preferred(r *http.Request) string {
	for _, l := range languages {
		if r.URL.Query().Get("lang") == l {
			return l
		}
	}
	_, i := language.MatchStrings(languageMatch, r.Header.Get("Accept-Language"))
	return languages[i]
}
