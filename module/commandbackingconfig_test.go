package module

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestBackingEnvironment: what is said of an environment that is wrong, all at once.
func TestBackingEnvironment(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	good := map[string]string{"LONGHORN_API_URL": managerURL, "BACKING_IMAGE_STORAGE_PATH": t.TempDir()}
	s3 := map[string]string{"STORAGE_BACKEND_TYPE": "s3", "S3_ENDPOINT": "https://s3.example.com", "S3_BUCKET": "b", "S3_ACCESS_KEY": "k", "S3_SECRET_KEY": "s"}
	for name, c := range map[string]struct {
		base, env map[string]string
		says      []string // none: it is right
	}{
		"nothing":        {nil, nil, []string{"LONGHORN_API_URL is missing", managerURL}},
		"empty":          {good, map[string]string{"LONGHORN_API_URL": ""}, []string{"LONGHORN_API_URL is missing or empty"}},
		"right":          {good, nil, nil},
		"manager":        {good, map[string]string{"LONGHORN_API_URL": "longhorn-backend:9500"}, []string{"LONGHORN_API_URL: ", managerURL}},
		"manager's user": {good, map[string]string{"LONGHORN_API_URL": "http://me:hidden@longhorn-backend:9500"}, []string{"LONGHORN_API_URL: the url has a user or a password in it"}},
		"type":           {good, map[string]string{"STORAGE_BACKEND_TYPE": "ceph"}, []string{`local, nfs or s3, not "ceph"`}},
		"type is a word": {good, map[string]string{"STORAGE_BACKEND_TYPE": "S3"}, []string{`not "S3"`}},
		"level":          {good, map[string]string{"LOG_LEVEL": "trace"}, []string{"debug, info, warn or error"}},
		"empty level":    {good, map[string]string{"LOG_LEVEL": "", "STORAGE_BACKEND_TYPE": "", "BACKING_IMAGE_API_TOKEN": ""}, nil},
		"relative":       {good, map[string]string{"BACKING_IMAGE_STORAGE_PATH": "images"}, []string{"absolute"}},
		"file":           {good, map[string]string{"BACKING_IMAGE_STORAGE_PATH": file}, []string{"not a directory"}},
		"nfs":            {good, map[string]string{"STORAGE_BACKEND_TYPE": "nfs"}, []string{"not on NFS"}},
		"nfs missing":    {good, map[string]string{"STORAGE_BACKEND_TYPE": "nfs", "BACKING_IMAGE_STORAGE_PATH": "/nonexistent"}, []string{"/nonexistent", "NFS"}},
		"s3":             {good, s3, nil},
		"s3 bare":        {good, map[string]string{"STORAGE_BACKEND_TYPE": "s3"}, []string{"S3_ENDPOINT", "S3_BUCKET", "S3_ACCESS_KEY", "S3_SECRET_KEY"}},
		"s3 in part":     {good, map[string]string{"STORAGE_BACKEND_TYPE": "s3", "S3_ENDPOINT": "s3.example.com", "S3_BUCKET": "b", "S3_ACCESS_KEY": "", "S3_SECRET_KEY": "s"}, []string{"S3_ENDPOINT: it needs a scheme", "S3_ACCESS_KEY is missing or empty"}},
		"public":         {good, map[string]string{"BACKING_IMAGE_PUBLIC_URL": "http://a.example/x=y"}, []string{"BACKING_IMAGE_PUBLIC_URL: releases"}},
		"token":          {good, map[string]string{"BACKING_IMAGE_API_TOKEN": "a\x00b"}, []string{"BACKING_IMAGE_API_TOKEN: "}},
		"all": {nil, map[string]string{"STORAGE_BACKEND_TYPE": "x", "LOG_LEVEL": "y", "BACKING_IMAGE_PUBLIC_URL": "z"},
			[]string{"LONGHORN_API_URL", "STORAGE_BACKEND_TYPE", "LOG_LEVEL", "BACKING_IMAGE_PUBLIC_URL"}},
	} {
		made, err := backingConfig(environ(c.base, c.env), ":8080")
		if len(c.says) == 0 {
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if config, err := json.Marshal(made.config); err != nil || !json.Valid(config) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err == nil {
			t.Errorf("%s: nothing is said, want %q", name, c.says)
			continue
		}
		for _, part := range c.says {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%s: %q does not mention %q", name, err, part)
			}
		}
		if n := strings.Count(err.Error(), "\n") + 1; name == "s3 bare" && n != 4 || name == "all" && n != 4 {
			t.Errorf("%s: %d problems: %v", name, n, err)
		}
	}
}

func environ(all ...map[string]string) func(string) string {
	return func(name string) string {
		value := ""
		for _, env := range all {
			if v, ok := env[name]; ok {
				value = v
			}
		}
		return value
	}
}

// TestBackingSecrets: no secret stands in the configuration, and no other value that
// Caddy would read as a placeholder.
func TestBackingSecrets(t *testing.T) {
	env := map[string]string{
		"LONGHORN_API_URL": "http://manager.example/{path}", "LONGHORN_AUTH_TOKEN": "secret-1", "BACKING_IMAGE_API_TOKEN": "secret-2", "BACKING_IMAGE_STORAGE_PATH": t.TempDir(),
		"STORAGE_BACKEND_TYPE": "s3", "S3_ENDPOINT": "https://s3.example.com", "S3_BUCKET": "b", "S3_ACCESS_KEY": "secret-3", "S3_SECRET_KEY": "secret-4",
	}
	made, err := backingConfig(environ(env), ":8080")
	if err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(made.config)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{"secret-", "{path}"} {
		if strings.Contains(string(config), secret) {
			t.Errorf("%s is in the configuration: %s", secret, config)
		}
	}
	for _, name := range []string{"LONGHORN_API_URL", "LONGHORN_AUTH_TOKEN", "BACKING_IMAGE_API_TOKEN", "S3_ACCESS_KEY", "S3_SECRET_KEY"} {
		if !strings.Contains(string(config), "{env."+name+"}") {
			t.Errorf("{env.%s} is not in the configuration: %s", name, config)
		}
	}
	if len(made.warnings) != 0 {
		t.Errorf("warnings: %q", made.warnings)
	}
}

// TestBackingDirectory: a directory of Longhorn's gets a subdirectory of ours, and what
// has been chosen once stays.
func TestBackingDirectory(t *testing.T) {
	node := t.TempDir()
	path := filepath.Join(node, "backing-images")
	where := func() (string, int) {
		made, err := backingConfig(environ(map[string]string{"LONGHORN_API_URL": managerURL, "BACKING_IMAGE_STORAGE_PATH": path, "BACKING_IMAGE_API_TOKEN": "x"}), ":8080")
		if err != nil {
			t.Fatal(err)
		}
		return made.storage, len(made.warnings)
	}
	if dir, warnings := where(); dir != path || warnings != 0 {
		t.Errorf("%s, %d warnings", dir, warnings)
	}
	if err := os.WriteFile(filepath.Join(node, "longhorn-disk.cfg"), []byte(`{"diskName":"d","diskUUID":"u"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(path, "registry")
	if dir, warnings := where(); dir != own || warnings != 1 {
		t.Errorf("%s, %d warnings", dir, warnings)
	}
	// A store that was there before Longhorn's disk stays where it is.
	if err := os.MkdirAll(filepath.Join(path, "mirror"), 0o700); err != nil {
		t.Fatal(err)
	}
	if dir, warnings := where(); dir != path || warnings != 1 {
		t.Errorf("%s, %d warnings", dir, warnings)
	}
	// And ours stays ours when the disk is taken from Longhorn.
	if err := os.Rename(filepath.Join(path, "mirror"), own); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(node, "longhorn-disk.cfg")); err != nil {
		t.Fatal(err)
	}
	if dir, warnings := where(); dir != own || warnings != 0 {
		t.Errorf("%s, %d warnings", dir, warnings)
	}
}
