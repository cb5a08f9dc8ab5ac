//go:build e2e

package e2e

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddy-registry/mirror/internal/backing"
	"github.com/caddy-registry/mirror/internal/backing/probe"
	"github.com/caddy-registry/mirror/internal/regtest"
)

const backingToken = "backing-e2e-token"

// backingImages is a server of backing images.
type backingImages struct {
	*process
	addr, admin string
	config      string // its Caddyfile
	setup       backingSetup
}

type backingSetup struct {
	addr, admin string
	home        string // of the process
	store       string // the storage, whole; default: a new directory
	options     string // of Caddy
	images      string // of backing_images in the app
	public      string // public_url, whose port is the address's; default: the address, which only this machine reaches
}

func (s backingSetup) caddyfile() string {
	site := "http://" + s.addr
	if s.public != "" {
		site += ", " + s.public
	}
	return fmt.Sprintf(`{
	admin %s
	%s
	registry {
		%s
		backing_images {
			public_url %s
			allow_private
			%s
		}
	}
}

%s {
	bind 127.0.0.1
	backing_images {
		api_token %s
	}
}
`, s.admin, s.options, s.store, cmp.Or(s.public, "http://"+s.addr), s.images, site, backingToken)
}

// startBackingImages starts a server that enforces what Longhorn needs.
func startBackingImages(t *testing.T, s backingSetup) *backingImages {
	t.Helper()
	if s.addr == "" {
		s.addr, s.admin = regtest.FreeAddress(t), regtest.FreeAddress(t)
	}
	if s.home == "" {
		s.home = workDir(t)
	}
	if s.store == "" {
		s.store = "storage disk " + workDir(t) + " {\n min_free 1%\n}"
	}
	if !strings.Contains(s.images, "longhorn_compat") {
		s.images += "\nlonghorn_compat enforce"
	}
	b := &backingImages{addr: s.addr, admin: s.admin, setup: s}
	b.config = writeFile(t, filepath.Join(s.home, "Caddyfile"), s.caddyfile())
	b.process = start(t, bare(s.home), caddyBin, "run", "--config", b.config, "--adapter", "caddyfile")
	b.untilReady(t, healthy(b.addr))
	return b
}

func healthy(addr string) func() bool {
	return func() bool {
		resp, err := http.Get("http://" + addr + "/health")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		return err == nil && resp.StatusCode == http.StatusOK && strings.ReplaceAll(strings.TrimSpace(string(text)), " ", "") == `{"status":"ok"}`
	}
}

// restart starts it on what it has kept.
func (b *backingImages) restart(t *testing.T) *backingImages {
	t.Helper()
	return startBackingImages(t, b.setup)
}

// do sends a request as somebody who may do everything.
func (b *backingImages) do(ctx context.Context, method, path string, body io.Reader, size int64, header ...string) (int, http.Header, []byte, error) {
	if strings.HasPrefix(path, "/") {
		path = "http://" + b.addr + path
	}
	req, err := http.NewRequestWithContext(ctx, method, path, body)
	if err != nil {
		return 0, nil, nil, err
	}
	if body != nil {
		req.ContentLength = size
	}
	req.Header.Set("Authorization", "Bearer "+backingToken)
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header, text, err
}

// putFile sends a file as curl -T does.
func (b *backingImages) putFile(t *testing.T, name, file string) (int, []byte) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	var body io.Reader = f
	if info.Size() == 0 {
		body = http.NoBody
	}
	status, _, text, err := b.do(t.Context(), http.MethodPut, "/v1/backing-images/"+name+"/content", body, info.Size())
	if err != nil {
		t.Fatal(err)
	}
	return status, text
}

// add is putFile of what must be accepted.
func (b *backingImages) add(t *testing.T, name, file string) backing.Version {
	t.Helper()
	status, text := b.putFile(t, name, file)
	if status != http.StatusCreated {
		t.Fatalf("%s: %d %s", name, status, text)
	}
	return decodeVersion(t, text)
}

func decodeVersion(t *testing.T, text []byte) backing.Version {
	t.Helper()
	var v backing.Version
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	return v
}

// version asks for a version.
func (b *backingImages) version(t *testing.T, name, reference string) (backing.Version, bool) {
	t.Helper()
	status, _, text, err := b.do(t.Context(), http.MethodGet, "/v1/backing-images/"+name+"/versions/"+reference, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	if status == http.StatusNotFound {
		return backing.Version{}, false
	}
	if status != http.StatusOK {
		t.Fatalf("version %s of %s: %d %s", reference, name, status, text)
	}
	return decodeVersion(t, text), true
}

// download writes the file of a version somewhere, by its address for machines.
func (b *backingImages) download(t *testing.T, v backing.Version, file string) {
	t.Helper()
	resp, err := http.Get(v.URLs.File)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := io.Copy(f, resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || n != v.Size || resp.ContentLength != v.Size {
		t.Fatalf("downloading %s: %s, %d bytes of %d, %v", v.URLs.File, resp.Status, n, v.Size, err)
	}
}

// digests are those of a file.
func digests(t *testing.T, file string) backing.Digests {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	short, long := sha256.New(), sha512.New()
	if _, err := io.Copy(io.MultiWriter(short, long), f); err != nil {
		t.Fatal(err)
	}
	return sums(short.Sum(nil), long.Sum(nil))
}

func digestsOf(data []byte) backing.Digests {
	short, long := sha256.Sum256(data), sha512.Sum512(data)
	return sums(short[:], long[:])
}

func sums(short, long []byte) backing.Digests {
	var d backing.Digests
	text := fmt.Sprintf(`{"sha256":"sha256:%s","sha512":"sha512:%s"}`, hex.EncodeToString(short), hex.EncodeToString(long))
	if err := json.Unmarshal([]byte(text), &d); err != nil {
		panic(err)
	}
	return d
}

// qemu makes images in a directory.
type qemu struct {
	dir string
	env []string
}

func newQEMU(t *testing.T) *qemu {
	t.Helper()
	dir := workDir(t)
	return &qemu{dir: dir, env: bare(dir)}
}

// img runs qemu-img in the directory; FILE names are below it.
func (q *qemu) img(t *testing.T, args ...string) string {
	t.Helper()
	out, err := q.try(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (q *qemu) try(t *testing.T, args ...string) (string, error) {
	t.Helper()
	script := `cd "$0" && exec "$@"`
	return try(t, q.env, "/bin/sh", append([]string{"-c", script, q.dir, tool(t, "qemu-img")}, args...)...)
}

func (q *qemu) path(name string) string { return filepath.Join(q.dir, name) }

// disk is a raw disk that has some content in it, and much of nothing.
func (q *qemu) disk(t *testing.T, name string, size int) string {
	t.Helper()
	data := make([]byte, size)
	for at := 0; at+300_000 < size; at += size / 4 {
		copy(data[at:], regtest.Random(fmt.Sprint(name, at), 300_000).Data)
	}
	if err := os.WriteFile(q.path(name), data, 0o644); err != nil {
		t.Fatal(err)
	}
	return q.path(name)
}

// TestBackingFormats: the images that qemu-img makes, and what becomes of each.
func TestBackingFormats(t *testing.T) {
	q := newQEMU(t)
	q.disk(t, "disk.raw", 8<<20)
	convert := func(name, format, options string) {
		args := []string{"convert", "-f", "raw", "-O", format}
		if options != "" {
			args = append(args, "-o", options)
		}
		if strings.Contains(name, "packed") {
			args = append(args, "-c")
		}
		q.img(t, append(args, "disk.raw", name)...)
	}
	convert("v2.qcow2", "qcow2", "compat=0.10")
	convert("v3.qcow2", "qcow2", "")
	convert("packed.qcow2", "qcow2", "")
	convert("lazy.qcow2", "qcow2", "lazy_refcounts=on")
	convert("small-clusters.qcow2", "qcow2", "cluster_size=512")
	convert("packed-zstd.qcow2", "qcow2", "compression_type=zstd")
	convert("extended.qcow2", "qcow2", "extended_l2=on")
	q.img(t, "create", "-f", "qcow2", "-b", "v3.qcow2", "-F", "qcow2", "child.qcow2")
	encrypted := func(name, options string) {
		// qemu-img measures how fast it is, and fails where the kernel's clock is too coarse.
		eventually(t, time.Minute, name, func() bool {
			_, err := q.try(t, "create", "-f", "qcow2", "--object", "secret,id=s,data=secret", "-o", "encrypt.key-secret=s,"+options, name, "8M")
			return err == nil
		})
	}
	encrypted("aes.qcow2", "encrypt.format=aes")
	encrypted("luks.qcow2", "encrypt.format=luks")
	q.img(t, "create", "-f", "qcow2", "-o", "data_file=data.raw", "external.qcow2", "8M")
	convert("disk.vmdk", "vmdk", "")
	convert("flat.vmdk", "vmdk", "subformat=monolithicFlat")
	convert("disk.vdi", "vdi", "")
	convert("disk.vhdx", "vhdx", "")
	convert("disk.vhd", "vpc", "")
	convert("fixed.vhd", "vpc", "subformat=fixed")
	convert("disk.qed", "qed", "")
	unaligned := regtest.Random("unaligned", 1_000_001).Data
	for name, data := range map[string][]byte{
		"unaligned.raw": unaligned,
		"empty.raw":     {},
		"page.html":     []byte("<!DOCTYPE html><title>404</title>"),
	} {
		if err := os.WriteFile(q.path(name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// What qemu-img writes may end anywhere, and Longhorn takes multiples of 512 only.
	for _, name := range []string{"v2.qcow2", "v3.qcow2", "packed.qcow2", "lazy.qcow2", "small-clusters.qcow2", "packed-zstd.qcow2", "extended.qcow2", "child.qcow2", "aes.qcow2", "luks.qcow2", "external.qcow2"} {
		run(t, q.env, "/usr/bin/truncate", "-s", "%512", q.path(name))
	}

	tests := []struct {
		file string
		code string // none: it is accepted
		warn string // the code where longhorn_compat is warn
	}{
		{"disk.raw", "", ""},
		{"v2.qcow2", "", ""},
		{"v3.qcow2", "", ""},
		{"packed.qcow2", "", ""},
		{"lazy.qcow2", "", ""},
		{"small-clusters.qcow2", "", ""},
		{"packed-zstd.qcow2", "unsupported_image", ""},
		{"extended.qcow2", "unsupported_image", ""},
		{"unaligned.raw", "size_not_aligned", ""},
		{"disk.vmdk", "unsupported_image", ""},
		{"disk.vdi", "unsupported_image", ""},
		{"disk.vhdx", "unsupported_image", ""},
		{"disk.vhd", "unsupported_image", ""},
		{"fixed.vhd", "unsupported_image", ""},
		{"disk.qed", "unsupported_image", ""},
		{"page.html", "unsupported_image", ""},
		{"child.qcow2", "backing_file_refused", "backing_file_refused"},
		{"flat.vmdk", "backing_file_refused", "backing_file_refused"},
		{"aes.qcow2", "unsupported_image", "unsupported_image"},
		{"luks.qcow2", "unsupported_image", "unsupported_image"},
		{"external.qcow2", "unsupported_image", "unsupported_image"},
		{"empty.raw", "unsupported_image", "unsupported_image"},
	}
	enforcing := startBackingImages(t, backingSetup{})
	warning := startBackingImages(t, backingSetup{images: "longhorn_compat warn"})
	for _, test := range tests {
		t.Run(test.file, func(t *testing.T) {
			file := q.path(test.file)
			name := strings.ReplaceAll(test.file, ".", "-")
			check := func(b *backingImages, want string) {
				t.Helper()
				status, text := b.putFile(t, name, file)
				if want != "" {
					var problem struct{ Code, Detail string }
					if err := json.Unmarshal(text, &problem); err != nil || status != http.StatusUnprocessableEntity || problem.Code != want {
						t.Errorf("%d %s, want 422 with %s", status, text, want)
					}
					if _, known := b.version(t, name, "v1"); known {
						t.Error("what was refused is a version")
					}
					return
				}
				if status != http.StatusCreated {
					t.Fatalf("%d %s", status, text)
				}
				v := decodeVersion(t, text)
				if v.Digests != digests(t, file) {
					t.Errorf("it has the digests %+v", v.Digests)
				}
				got := filepath.Join(workDir(t), test.file)
				b.download(t, v, got)
				if format := probe.Format(filepath.Ext(test.file)[1:]); format == probe.QCOW2 || format == probe.Raw {
					if v.Format != format {
						t.Errorf("it is taken for %s", v.Format)
					}
					out := q.img(t, "compare", "-f", string(format), "-F", "raw", got, map[bool]string{true: "disk.raw", false: test.file}[test.file != "unaligned.raw"])
					if !strings.Contains(out, "Images are identical.") {
						t.Error(out)
					}
				} else if digests(t, got) != v.Digests {
					t.Error("other bytes came back")
				}
			}
			check(enforcing, test.code)
			check(warning, test.warn)
		})
	}
}

// TestBackingRanges: qemu reads an image where it is, part by part.
func TestBackingRanges(t *testing.T) {
	q := newQEMU(t)
	q.disk(t, "disk.raw", 16<<20)
	q.img(t, "convert", "-f", "raw", "-O", "qcow2", "-c", "disk.raw", "disk.qcow2")
	run(t, q.env, "/usr/bin/truncate", "-s", "%512", q.path("disk.qcow2"))
	b := startBackingImages(t, backingSetup{})
	v := b.add(t, "ranges", q.path("disk.qcow2"))
	if v.VirtualSize != 16<<20 || v.Format != probe.QCOW2 {
		t.Errorf("%+v", v)
	}
	remote := fmt.Sprintf(`json:{"driver":"qcow2","file":{"driver":"http","url":%q}}`, v.URLs.File)
	if out := q.img(t, "info", remote); !strings.Contains(out, "virtual size: 16 MiB") {
		t.Error(out)
	}
	if out := q.img(t, "compare", "-F", "raw", remote, "disk.raw"); !strings.Contains(out, "Images are identical.") {
		t.Error(out)
	}
	out := run(t, q.env, tool(t, "qemu-io"), "-r", "-c", "read 4M 64k", "-c", "read 15M 1M", remote)
	if strings.Count(out, "ops;") != 2 {
		t.Error(out)
	}
}

// TestBackingOverS3: the same where the bytes are in a bucket.
func TestBackingOverS3(t *testing.T) {
	server := startS3(t, "versitygw")
	q := newQEMU(t)
	q.disk(t, "disk.raw", 32<<20)
	q.img(t, "convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2")
	run(t, q.env, "/usr/bin/truncate", "-s", "%512", q.path("disk.qcow2"))
	b := startBackingImages(t, backingSetup{store: server.store(workDir(t))})
	raw, v := b.add(t, "disk", q.path("disk.raw")), b.add(t, "disk", q.path("disk.qcow2"))
	if raw.Version == v.Version {
		t.Errorf("both are version %s", v.Version)
	}
	for file, v := range map[string]backing.Version{"disk.raw": raw, "disk.qcow2": v} {
		if v.Digests != digests(t, q.path(file)) {
			t.Errorf("%s has the digests %+v", file, v.Digests)
		}
	}
	if !server.holdsBlobs(t, []string{raw.Digests.SHA256.String(), v.Digests.SHA256.String()}) {
		t.Error("the bucket lacks what was uploaded")
	}
	// Another machine has nothing of it near.
	b.stop(t)
	far := startBackingImages(t, backingSetup{store: server.store(workDir(t)), addr: b.addr, admin: b.admin})
	again, known := far.version(t, "disk", v.Version)
	if !known || again.Digests != v.Digests {
		t.Fatalf("another process finds %+v", again)
	}
	far.download(t, again, q.path("got.qcow2"))
	if out := q.img(t, "compare", "got.qcow2", "-F", "raw", "disk.raw"); !strings.Contains(out, "Images are identical.") {
		t.Error(out)
	}
	remote := fmt.Sprintf(`json:{"driver":"raw","file":{"driver":"http","url":%q}}`, raw.URLs.File)
	if out := q.img(t, "compare", "-F", "raw", remote, "disk.raw"); !strings.Contains(out, "Images are identical.") {
		t.Error(out)
	}
}

// TestBackingCommand: the server that the environment configures, and the requests that
// its users know.
func TestBackingCommand(t *testing.T) {
	dir := workDir(t)
	addr := regtest.FreeAddress(t)
	longhorn := regtest.FreeAddress(t) // nobody is there, and that is no reason not to start
	b := &backingImages{addr: addr}
	b.process = start(t, bare(dir,
		"LONGHORN_API_URL=http://"+longhorn,
		"BACKING_IMAGE_STORAGE_PATH="+dir+"/images",
		"STORAGE_BACKEND_TYPE=local",
		"LOG_LEVEL=info",
	), caddyBin, "registry", "backing-images", "--listen", addr)
	b.untilReady(t, healthy(addr))

	q := newQEMU(t)
	disk := q.disk(t, "ubuntu-20.04-base.img", 8<<20)
	curl := func(args ...string) string { return run(t, bare(dir), tool(t, "curl"), args...) }
	out := curl("-sS", "-X", "POST", "http://"+addr+"/v1/backing-images",
		"-H", "Content-Type: multipart/form-data",
		"-F", "name=base-ubuntu-20.04", "-F", "file=@"+disk)
	v := decodeVersion(t, []byte(out))
	if v.State != backing.Ready || v.Name != "base-ubuntu-20.04" || v.Digests != digests(t, disk) {
		t.Fatal(out)
	}
	curl("-sSf", "-o", dir+"/got", "http://"+addr+"/v1/backing-images/base-ubuntu-20.04/download")
	if digests(t, dir+"/got") != v.Digests {
		t.Error("other bytes came back")
	}
	if out := curl("-sSf", "http://"+addr+"/v1/backing-images"); !strings.Contains(out, `"base-ubuntu-20.04"`) {
		t.Error(out)
	}
	// What is missing is named.
	if _, err := try(t, bare(dir), caddyBin, "registry", "backing-images", "--listen", regtest.FreeAddress(t)); err == nil || !strings.Contains(err.Error(), "LONGHORN_API_URL") || !strings.Contains(err.Error(), "http://longhorn-backend.longhorn-system:9500") {
		t.Errorf("without LONGHORN_API_URL: %v", err)
	}
}

// TestBackingTwoOfAName: two uploads of one name at the same time are two versions, and
// each has its own bytes.
func TestBackingTwoOfAName(t *testing.T) {
	b := startBackingImages(t, backingSetup{})
	files := [2][]byte{regtest.Random("one", 4<<20).Data, regtest.Random("two", 4<<20).Data}
	type answer struct {
		status int
		text   []byte
		err    error
	}
	answers := make(chan answer, 2)
	// Both have begun before either ends.
	var bodies [2]*io.PipeWriter
	for i, data := range files {
		r, w := io.Pipe()
		bodies[i] = w
		go func() {
			status, _, text, err := b.do(t.Context(), http.MethodPut, "/v1/backing-images/both/content", r, int64(len(data)))
			answers <- answer{status, text, err}
		}()
		if _, err := w.Write(data[:1<<20]); err != nil {
			t.Fatal(err)
		}
	}
	for i, data := range files {
		if _, err := bodies[i].Write(data[1<<20:]); err != nil {
			t.Fatal(err)
		}
		bodies[i].Close()
	}
	got := map[string]backing.Digests{}
	for range files {
		a := <-answers
		if a.err != nil || a.status != http.StatusCreated {
			t.Fatalf("%d %s %v", a.status, a.text, a.err)
		}
		v := decodeVersion(t, a.text)
		got[v.Version] = v.Digests
	}
	if len(got) != 2 {
		t.Fatalf("the versions are %v", got)
	}
	found := map[backing.Digests]bool{}
	for name, d := range got {
		v, known := b.version(t, "both", name)
		if !known || v.State != backing.Ready || v.Digests != d {
			t.Errorf("version %s is %+v", name, v)
		}
		found[d] = true
	}
	for i, data := range files {
		if !found[digestsOf(data)] {
			t.Errorf("what %d sent is no version", i)
		}
	}
}

// A tusUpload is an upload that can be gone on with.
type tusUpload struct {
	b        *backingImages
	location string
}

func (b *backingImages) tus(t *testing.T, name string, size int) *tusUpload {
	t.Helper()
	status, header, text, err := b.do(t.Context(), http.MethodPost, "/v1/uploads", nil, 0,
		"Tus-Resumable", "1.0.0", "Upload-Length", fmt.Sprint(size),
		"Upload-Metadata", "name "+base64.StdEncoding.EncodeToString([]byte(name)))
	if err != nil || status != http.StatusCreated || header.Get("Location") == "" {
		t.Fatalf("beginning an upload: %d %s %v", status, text, err)
	}
	base, err := url.Parse("http://" + b.addr + "/v1/uploads")
	if err != nil {
		t.Fatal(err)
	}
	at, err := base.Parse(header.Get("Location"))
	if err != nil {
		t.Fatal(err)
	}
	return &tusUpload{b: b, location: at.RequestURI()}
}

// offset asks how far it has come.
func (u *tusUpload) offset(t *testing.T) int {
	t.Helper()
	status, header, _, err := u.b.do(t.Context(), http.MethodHead, u.location, nil, 0, "Tus-Resumable", "1.0.0")
	var n int
	if err == nil {
		_, err = fmt.Sscan(header.Get("Upload-Offset"), &n)
	}
	if err != nil || status != http.StatusOK {
		t.Fatalf("asking for the offset: %d %v", status, err)
	}
	return n
}

// patch sends what follows an offset.
func (u *tusUpload) patch(ctx context.Context, offset int, body io.Reader, size int) (int, error) {
	status, _, text, err := u.b.do(ctx, http.MethodPatch, u.location, body, int64(size),
		"Tus-Resumable", "1.0.0", "Upload-Offset", fmt.Sprint(offset), "Content-Type", "application/offset+octet-stream")
	if err == nil && status != http.StatusNoContent {
		err = fmt.Errorf("%d %s", status, text)
	}
	return status, err
}

// finish sends the rest, and waits for the version.
func (u *tusUpload) finish(t *testing.T, name string, data []byte) backing.Version {
	t.Helper()
	eventually(t, time.Minute, "the end of the upload", func() bool {
		at := u.offset(t)
		status, err := u.patch(t.Context(), at, bytes.NewReader(data[at:]), len(data)-at)
		if err != nil && status != http.StatusConflict { // another request is not over
			t.Fatal(err)
		}
		return err == nil
	})
	var v backing.Version
	eventually(t, time.Minute, "the version", func() bool {
		var known bool
		v, known = u.b.version(t, name, "v1")
		return known && v.State == backing.Ready
	})
	return v
}
