// Command nfs is what a test of NFS needs inside a virtual machine that has nothing
// else: a server, what mounts it, and a client of backing images.
package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"syscall"
	"time"

	"github.com/go-git/go-billy/v5"
	"github.com/go-git/go-billy/v5/osfs"
	nfs "github.com/willscott/go-nfs"
	"github.com/willscott/go-nfs/helpers"
)

func main() {
	if len(os.Args) < 4 {
		log.Fatal("use: nfs serve PORT DIR | mount PORT DIR | put URL NAME | get URL NAME")
	}
	var err error
	switch command, at, what := os.Args[1], os.Args[2], os.Args[3]; command {
	case "serve":
		err = serve("127.0.0.1:"+at, what)
	case "mount":
		err = mount(at, what)
	case "put":
		err = put(at, what)
	case "get":
		err = get(at, what)
	}
	if err != nil {
		log.Fatal(err)
	}
}

func serve(addr, dir string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	return nfs.Serve(l, helpers.NewCachingHandler(helpers.NewNullAuthHandler(files{osfs.New(dir)}), 4096))
}

// files are files whose attributes can be set.
type files struct{ billy.Filesystem }

func (f files) path(name string) string { return f.Join(f.Root(), name) }

func (f files) Chmod(name string, mode os.FileMode) error { return os.Chmod(f.path(name), mode) }
func (f files) Lchown(name string, uid, gid int) error    { return os.Lchown(f.path(name), uid, gid) }
func (f files) Chown(name string, uid, gid int) error     { return os.Chown(f.path(name), uid, gid) }
func (f files) Chtimes(name string, atime, mtime time.Time) error {
	return os.Chtimes(f.path(name), atime, mtime)
}

// mount mounts what a server has, as soon as it answers.
func mount(port, dir string) error {
	if err := wait(func() error {
		conn, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err == nil {
			conn.Close()
		}
		return err
	}); err != nil {
		return err
	}
	options := fmt.Sprintf("addr=127.0.0.1,vers=3,proto=tcp,mountproto=tcp,port=%[1]s,mountport=%[1]s,mountaddr=127.0.0.1,nolock,mountvers=3", port)
	return syscall.Mount("127.0.0.1:/", dir, "nfs", 0, options)
}

func wait(ready func() error) error {
	var err error
	for range 600 {
		if err = ready(); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

const size = 20 << 20

// image is always the same.
func image() io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{1}), size)
}

type version struct {
	State   string
	Digests struct{ SHA256 string }
}

func digest() string {
	sum := sha256.New()
	io.Copy(sum, image())
	return fmt.Sprintf("sha256:%x", sum.Sum(nil))
}

func put(url, name string) error {
	if err := healthy(url); err != nil {
		return err
	}
	req, err := http.NewRequest(http.MethodPut, url+"/v1/backing-images/"+name+"/content", image())
	if err != nil {
		return err
	}
	req.ContentLength = size
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	var v version
	if err := json.Unmarshal(text, &v); err != nil || resp.StatusCode != http.StatusCreated || v.State != "ready" || v.Digests.SHA256 != digest() {
		return fmt.Errorf("%s: %s", resp.Status, text)
	}
	return nil
}

func get(url, name string) error {
	if err := healthy(url); err != nil {
		return err
	}
	resp, err := http.Get(url + "/v1/backing-images/" + name + "/download")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	sum := sha256.New()
	n, err := io.Copy(sum, resp.Body)
	if err != nil {
		return err
	}
	if got := fmt.Sprintf("sha256:%x", sum.Sum(nil)); resp.StatusCode != http.StatusOK || got != digest() {
		return fmt.Errorf("%s: %d bytes, which are %s", resp.Status, n, got)
	}
	return nil
}

func healthy(url string) error {
	return wait(func() error {
		resp, err := http.Get(url + "/health")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("/health: %s", resp.Status)
		}
		return nil
	})
}
