// Package examples_test checks that every example is what it should be: a
// Caddyfile that is formatted, adapts without a warning and loads.
package examples_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-registry/mirror"
)

func TestExamples(t *testing.T) {
	// Caddy works out its own place before any test runs.
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_DATA_HOME", home)
	t.Setenv("XDG_CONFIG_HOME", home)
	place := caddy.DefaultStorage.Path
	caddy.DefaultStorage.Path = home
	t.Cleanup(func() { caddy.DefaultStorage.Path = place })

	// What the examples expect of the environment.
	t.Setenv("CORP_CA", writeCA(t))
	for _, name := range []string{"ALICE_HASH", "CI_HASH"} {
		t.Setenv(name, "$2a$14$Zkx19XLiW6VYouLHR5NmfOFU0z2GTNmpkT/5qqR7hx4IjWJPDhjvG")
	}
	for _, name := range []string{"HUB_USER", "HUB_TOKEN", "HARBOR_USER", "HARBOR_SECRET", "S3_ACCESS_KEY", "S3_SECRET_KEY", "BACKING_IMAGE_API_TOKEN"} {
		t.Setenv(name, "test")
	}

	t.Setenv("LONGHORN_API_URL", "http://longhorn-backend.longhorn-system:9500")

	files, err := filepath.Glob("*/*Caddyfile")
	if err != nil || len(files) == 0 {
		t.Fatalf("no examples found: %v", err)
	}
	for _, file := range files {
		t.Run(file, func(t *testing.T) {
			source, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if formatted := caddyfile.Format(source); string(formatted) != string(source) {
				t.Errorf("not formatted; caddy fmt makes of it:\n%s", formatted)
			}
			adapted, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt(source, map[string]any{"filename": file})
			if err != nil {
				t.Fatal(err)
			}
			for _, w := range warnings {
				t.Errorf("the adapter warns: %s", w)
			}
			var config caddy.Config
			if err := json.Unmarshal(adapted, &config); err != nil {
				t.Fatal(err)
			}
			if err := caddy.Validate(&config); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestEveryFolderHasOne finds a folder whose Caddyfile was forgotten.
func TestEveryFolderHasOne(t *testing.T) {
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if !entry.IsDir() {
			continue
		}
		if _, err := os.Stat(filepath.Join(entry.Name(), "Caddyfile")); err != nil {
			t.Error(err)
		}
	}
}

// writeCA makes a certificate authority and returns the file it is in.
func writeCA(t *testing.T) string {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "corp CA"},
		NotAfter:              time.Now().Add(time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "ca.pem")
	err = os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return file
}
