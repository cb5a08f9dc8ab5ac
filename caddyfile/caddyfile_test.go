package caddyfile_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-registry/mirror"
)

var update = flag.Bool("update", false, "rewrite what testdata expects")

const dashes = "----------\n"

// adapt turns a Caddyfile into pretty JSON.
func adapt(caddyfile string) (string, []caddyconfig.Warning, error) {
	adapted, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(caddyfile), map[string]any{"filename": "Testfile"})
	if err != nil {
		return "", warnings, err
	}
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, adapted, "", "\t"); err != nil {
		return "", warnings, err
	}
	return pretty.String(), warnings, nil
}

var fileAndLine = regexp.MustCompile(`Testfile:[1-9]`)

// TestAdapt adapts the Caddyfiles in testdata. A case is a Caddyfile, a line
// of dashes, and the expected JSON or a part of the expected error.
func TestAdapt(t *testing.T) {
	files, err := filepath.Glob("testdata/*.caddyfiletest")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases found: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".caddyfiletest"), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			source, want, ok := strings.Cut(string(data), dashes)
			if !ok {
				t.Fatal("no line of ten dashes")
			}
			got, warnings, err := adapt(source)
			for _, w := range warnings {
				t.Errorf("warning: %s", w)
			}
			if *update {
				if err != nil {
					got = err.Error()
				}
				if err := os.WriteFile(file, []byte(source+dashes+got+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
				want = got
			}
			want = strings.TrimSpace(want)
			if strings.HasPrefix(want, "{") {
				if err != nil {
					t.Fatal(err)
				}
				if got != want {
					t.Errorf("adapts to\n%s\nwant\n%s", got, want)
				}
				return
			}
			if err == nil {
				t.Fatalf("adapts without an error; want %q", want)
			}
			if want == "" || !strings.Contains(err.Error(), want) {
				t.Errorf("error %q\ndoes not contain %q", err, want)
			}
			if !fileAndLine.MatchString(err.Error()) {
				t.Errorf("error %q names no file and line", err)
			}
		})
	}
}

// TestOrder has the directive find its place without an order option: behind
// what asks for a password, before what answers every path.
func TestOrder(t *testing.T) {
	want := []string{"authentication", "encode", "backing_images", "registry_mirror", "static_response", "reverse_proxy", "file_server"}
	// As Caddy would put them, and the wrong way round.
	for _, reverse := range []bool{false, true} {
		t.Run(fmt.Sprint("reverse=", reverse), func(t *testing.T) {
			lines := []string{
				"\tbasic_auth {\n\t\tbob $2a$14$Zkx19XLiW6VYouLHR5NmfOFU0z2GTNmpkT/5qqR7hx4IjWJPDhjvG\n\t}\n",
				"\tencode\n",
				"\tbacking_images\n",
				"\tregistry_mirror\n",
				"\trespond /about 200\n",
				"\treverse_proxy localhost:8080\n",
				"\tfile_server\n",
			}
			if reverse {
				slices.Reverse(lines)
			}
			adapted, _, err := adapt("http://mirror.test {\n" + strings.Join(lines, "") + "}\n")
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, match := range regexp.MustCompile(`"handler": "(\w+)"`).FindAllStringSubmatch(adapted, -1) {
				if match[1] != "subroute" {
					got = append(got, match[1])
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("handlers run in the order %q, want %q", got, want)
			}
		})
	}
}
