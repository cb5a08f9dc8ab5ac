package module

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
)

// managerURL is Longhorn's manager in a cluster that was installed as its
// documentation says.
const managerURL = "http://longhorn-backend.longhorn-system:9500"

// hello is what a person is told who opens the address in a browser.
const hello = `This is a server of backing images for Longhorn.

GET  /v1/backing-images   the images, as JSON
POST /v1/backing-images   a new one: curl -F name=debian-13 -F file=@debian-13.qcow2
GET  /health              whether it runs
GET  /ready               whether it can store, and Longhorn answers

The API: https://github.com/caddy-registry/mirror/blob/main/docs/backing-images-api.md
By hand: caddy registry image --help
`

func backingCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "backing-images",
		Short: "Serves backing images to Longhorn, configured by the environment",
		Long: `
Runs a server of backing images on port 8080, without a configuration file:

	LONGHORN_API_URL            Longhorn's manager; required:
	                            ` + managerURL + `
	LONGHORN_AUTH_TOKEN         what a proxy before the manager expects
	BACKING_IMAGE_STORAGE_PATH  /var/lib/longhorn/backing-images
	STORAGE_BACKEND_TYPE        local, nfs or s3; local
	S3_ENDPOINT, S3_BUCKET, S3_ACCESS_KEY, S3_SECRET_KEY
	                            required with s3
	LOG_LEVEL                   debug, info, warn or error; info
	BACKING_IMAGE_PUBLIC_URL    where Longhorn reaches this server; without it
	                            images are sent to Longhorn
	BACKING_IMAGE_API_TOKEN     what whoever writes has to send; without it every
	                            client in a private network may write

It ends at SIGTERM when the downloads under way have ended, within an hour. What
else can be configured takes a Caddyfile; --print shows what there is of it now.
`,
		Example: "  LONGHORN_API_URL=" + managerURL + " caddy registry backing-images",
		Args:    cobra.NoArgs,
		RunE:    backingCommand,
	}
	cmd.Flags().String("listen", ":8080", "The address to answer at")
	cmd.Flags().Bool("print", false, "Print the configuration as JSON, with secrets as placeholders, and do not run it")
	return cmd
}

func backingCommand(cmd *cobra.Command, _ []string) error {
	listen, err := cmd.Flags().GetString("listen")
	if err != nil {
		return err
	}
	show, err := cmd.Flags().GetBool("print")
	if err != nil {
		return err
	}
	made, err := backingConfig(os.Getenv, listen)
	if err != nil {
		return err
	}
	config, err := json.MarshalIndent(made.config, "", "  ")
	if err != nil {
		return err
	}
	if show {
		for _, warning := range made.warnings {
			fmt.Fprintln(cmd.ErrOrStderr(), warning)
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s\n", config)
		return nil
	}
	caddy.TrapSignals()
	if err := caddy.Load(config, true); err != nil {
		return err
	}
	for _, warning := range made.warnings {
		caddy.Log().Named("registry").Warn(warning)
	}
	caddy.Log().Named("registry").Info("serving backing images", zap.String("address", listen), zap.String("storage", made.storage))
	select {} // until a signal ends the process
}

// madeConfig is the configuration that an environment means.
type madeConfig struct {
	config   map[string]any
	storage  string // where images lie, for people
	warnings []string
}

// backingConfig makes a configuration of the environment. Its error names all that
// is wrong.
func backingConfig(getenv func(string) string, listen string) (*madeConfig, error) {
	env := environment{get: getenv}
	made := new(madeConfig)

	longhorn := map[string]any{"name": "default", "url": env.need("LONGHORN_API_URL", "set it to the address of Longhorn's manager; in most clusters that is "+managerURL)}
	if text := getenv("LONGHORN_API_URL"); text != "" {
		if err := checkManagerURL(text); err != nil {
			env.wrong("LONGHORN_API_URL: %v", err)
		}
	}
	if env.secret("LONGHORN_AUTH_TOKEN") {
		longhorn["token"] = "{env.LONGHORN_AUTH_TOKEN}"
	}
	images := map[string]any{"longhorn": []any{longhorn}}
	if public := getenv("BACKING_IMAGE_PUBLIC_URL"); public != "" {
		if _, err := parsePublicURL(public); err != nil {
			env.wrong("BACKING_IMAGE_PUBLIC_URL: %s", strings.TrimPrefix(err.Error(), "public_url: "))
		}
		images["public_url"] = literal("BACKING_IMAGE_PUBLIC_URL", public)
	}
	app := map[string]any{"backing_images": images, "storage": env.storage(made)}

	level := cmp.Or(getenv("LOG_LEVEL"), "info")
	switch level {
	case "debug", "info", "warn", "error":
	default:
		env.wrong("LOG_LEVEL is debug, info, warn or error, not %.50q", level)
	}
	if _, _, err := net.SplitHostPort(listen); err != nil {
		env.wrong("--listen: %q is no address such as :8080 or 10.0.0.1:8080", listen)
	}

	site := map[string]any{"handler": "backing_images"}
	if env.secret("BACKING_IMAGE_API_TOKEN") {
		site["api_token"] = "{env.BACKING_IMAGE_API_TOKEN}"
	} else {
		site["access"] = rules(rule{"allow", []string{"pull"}, nil, nil}, rule{"allow", []string{"push", "delete"}, []string{"net:private_ranges"}, nil})
		made.warnings = append(made.warnings, "BACKING_IMAGE_API_TOKEN is not set: every client in a private network may write and delete; set it, and give it to `caddy registry image` or send it as Authorization: Bearer")
	}
	if len(env.problems) > 0 {
		return nil, errors.Join(env.problems...)
	}
	made.config = map[string]any{
		"admin":   map[string]any{"config": map[string]any{"persist": false}},
		"logging": map[string]any{"logs": map[string]any{"default": map[string]any{"level": strings.ToUpper(level)}}},
		"apps": map[string]any{
			"registry": app,
			"http": map[string]any{
				// Longhorn begins a download that is cut from the start.
				"grace_period": "1h",
				"servers": map[string]any{"backing_images": map[string]any{
					"listen":          []string{listen},
					"automatic_https": map[string]any{"disable": true},
					"logs":            map[string]any{},
					"routes": []any{
						route(map[string]any{"handler": "vars", "log_skip": true}, "/health", "/ready"),
						route(site),
						// What other registries and containerDisks are made of, to read.
						route(map[string]any{
							"handler": "registry_mirror", "default": "off", "hosted": []string{defaultPrefix + "/**"},
							"access": rules(rule{"allow", []string{"pull"}, nil, []string{defaultPrefix + "/**"}}),
						}, "/v2", "/v2/*"),
						map[string]any{
							"match":  []any{map[string]any{"path": []string{"/"}, "method": []string{"GET", "HEAD"}}},
							"handle": []any{map[string]any{"handler": "static_response", "status_code": 200, "headers": map[string][]string{"Content-Type": {"text/plain; charset=utf-8"}}, "body": hello}},
						},
						route(map[string]any{"handler": "static_response", "status_code": 404, "body": "there is nothing here; the API is under /v1/backing-images\n"}),
					},
				}},
			},
		},
	}
	return made, nil
}

type rule struct {
	effect  string
	actions []string
	to, on  []string
}

func rules(all ...rule) map[string]any {
	var list []AccessRule
	for _, r := range all {
		list = append(list, AccessRule{r.effect, r.actions, r.to, r.on})
	}
	return map[string]any{"rules": list}
}

func route(handler map[string]any, paths ...string) map[string]any {
	r := map[string]any{"handle": []any{handler}}
	if len(paths) > 0 {
		r["match"] = []any{map[string]any{"path": paths}}
	}
	return r
}

// environment reads variables and collects what is wrong with them.
type environment struct {
	get      func(string) string
	problems []error
}

func (e *environment) wrong(format string, args ...any) {
	e.problems = append(e.problems, fmt.Errorf(format, args...))
}

// need is a variable that cannot be left out or empty.
func (e *environment) need(name, remedy string) string {
	value := e.get(name)
	if value == "" {
		e.wrong("%s is missing or empty: %s", name, remedy)
	}
	return literal(name, value)
}

// secret reports whether a secret is given. Its value is not looked at twice: the
// configuration has a placeholder for it.
func (e *environment) secret(name string) bool {
	value := e.get(name)
	if value == "" {
		return false
	}
	if err := checkToken(strings.TrimSpace(value)); err != nil {
		e.wrong("%s: %v", name, err)
	}
	return true
}

// literal is a value as the configuration has it: itself, unless Caddy would look for
// placeholders in it.
func literal(name, value string) string {
	if strings.ContainsAny(value, `{}\`) {
		return "{env." + name + "}"
	}
	return value
}

// storage is where the images are kept.
func (e *environment) storage(made *madeConfig) map[string]any {
	path := cmp.Or(e.get("BACKING_IMAGE_STORAGE_PATH"), "/var/lib/longhorn/backing-images")
	if !filepath.IsAbs(path) {
		e.wrong("BACKING_IMAGE_STORAGE_PATH: %q is not an absolute path", path)
	}
	path = filepath.Clean(path)
	if strings.ContainsAny(path, "{}") {
		e.wrong("BACKING_IMAGE_STORAGE_PATH: %q has braces in it; use another name", path)
	}
	if info, err := os.Stat(path); err == nil && !info.IsDir() {
		e.wrong("BACKING_IMAGE_STORAGE_PATH: %s is not a directory", path)
	}
	kind := cmp.Or(e.get("STORAGE_BACKEND_TYPE"), "local")
	switch kind {
	case "local":
		made.storage = ownDirectory(path)
	case "nfs":
		on, err := onNFS(path)
		switch {
		case err != nil:
			e.wrong("BACKING_IMAGE_STORAGE_PATH: with STORAGE_BACKEND_TYPE=nfs it has to be where an NFS share is mounted: %v", err)
		case !on:
			e.wrong("BACKING_IMAGE_STORAGE_PATH: %s is not on NFS; mount the share there before this starts, or set STORAGE_BACKEND_TYPE=local", path)
		}
		made.storage = ownDirectory(path)
	case "s3":
		made.storage = "bucket " + e.get("S3_BUCKET")
		e.warnLonghorn(made, path)
		return e.bucket(filepath.Join(ownDirectory(path), "cache"))
	default:
		e.wrong("STORAGE_BACKEND_TYPE is local, nfs or s3, not %.50q", kind)
	}
	e.warnLonghorn(made, path)
	return map[string]any{"backend": "disk", "directory": made.storage}
}

func (e *environment) bucket(cache string) map[string]any {
	const why = "it is required with STORAGE_BACKEND_TYPE=s3"
	storage := map[string]any{
		"backend":  "s3",
		"bucket":   e.need("S3_BUCKET", why),
		"endpoint": e.need("S3_ENDPOINT", why+", and has the scheme: https://s3.example.com"),
		"cache":    cache,
	}
	e.need("S3_ACCESS_KEY", why)
	e.need("S3_SECRET_KEY", why)
	storage["credentials"] = map[string]any{"key": "{env.S3_ACCESS_KEY}", "secret": "{env.S3_SECRET_KEY}"}
	if endpoint := e.get("S3_ENDPOINT"); endpoint != "" && !strings.HasPrefix(endpoint, "http://") && !strings.HasPrefix(endpoint, "https://") {
		e.wrong("S3_ENDPOINT: it needs a scheme, as in https://s3.example.com")
	}
	if region := e.get("AWS_REGION"); region != "" {
		storage["region"] = literal("AWS_REGION", region)
	}
	return storage
}

// subdirectory is ours in a directory of Longhorn's, which has one for each of its own
// images: <name>-<8 letters and digits>.
const subdirectory = "registry"

// longhornDisk reports whether a path is where Longhorn keeps its backing images:
// beside the file that marks one of its disks.
func longhornDisk(path string) bool {
	_, err := os.Stat(filepath.Join(filepath.Dir(path), "longhorn-disk.cfg"))
	return err == nil
}

// ownDirectory is where the store lies: the path, unless that is Longhorn's own. What
// has been chosen once stays.
func ownDirectory(path string) string {
	own := filepath.Join(path, subdirectory)
	if _, err := os.Stat(own); err == nil {
		return own
	}
	for _, ours := range [...]string{"mirror", "cache"} {
		if _, err := os.Stat(filepath.Join(path, ours)); err == nil {
			return path
		}
	}
	if longhornDisk(path) {
		return own
	}
	return path
}

func (e *environment) warnLonghorn(made *madeConfig, path string) {
	if longhornDisk(path) {
		made.warnings = append(made.warnings, fmt.Sprintf("%s is the directory where Longhorn keeps its own backing images on this node: what is stored here takes of the space that Longhorn may schedule on; reserve it in Longhorn's settings of the disk, or use another disk by BACKING_IMAGE_STORAGE_PATH", path))
	}
}
