//go:build e2e

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A vm is a machine with a kernel of its own, an emulated one: it needs nothing of the
// kernel below it.
type vm struct {
	script  string            // what it runs; its last line is `echo VM-OK`
	files   map[string]string // what it has besides busybox: from path to path
	modules []string          // of the kernel
}

// run runs it, and returns what it says.
func (m vm) run(t *testing.T) string {
	t.Helper()
	kernel := filepath.Join(checkout, ".cache/kernel")
	versions, err := filepath.Glob(kernel + "/[0-9]*")
	if err != nil || len(versions) != 1 {
		t.Fatalf("there is no kernel in %s: run e2e/install.sh", kernel)
	}
	dir := workDir(t)
	initramfs, err := os.Create(dir + "/initramfs")
	if err != nil {
		t.Fatal(err)
	}
	defer initramfs.Close()
	out := &archive{Writer: bufio.NewWriter(initramfs)}
	for _, path := range []string{"bin", "proc", "sys", "dev", "tmp", "mnt", "srv", "data", "lib"} {
		out.add(path, 0o40755, nil)
	}
	out.file("bin/busybox", tool(t, "busybox"))
	for name, path := range m.files {
		out.file("bin/"+name, path)
	}
	load := ""
	for i, path := range m.needs(t, kernel) {
		name := fmt.Sprintf("lib/%d.ko", i)
		out.file(name, filepath.Join(versions[0], path))
		load += "insmod /" + name + "\n"
	}
	out.add("init", 0o100755, []byte(`#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/tmp
mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev; mount -t tmpfs t /tmp; mount -t tmpfs t /srv; mount -t tmpfs t /data
ip link set lo up
`+load+m.script+`
poweroff -f
`))
	out.add("TRAILER!!!", 0, nil)
	if out.err == nil {
		out.err = out.Flush()
	}
	if out.err != nil {
		t.Fatal(out.err)
	}
	p := start(t, bare(dir), tool(t, "qemu-system-x86_64"), "-accel", "tcg", "-m", "1024", "-smp", "1", "-nographic", "-no-reboot", "-nic", "none",
		"-kernel", kernel+"/vmlinuz", "-initrd", initramfs.Name(), "-append", "console=ttyS0 quiet panic=-1 rdinit=/init")
	if err := p.wait(t, 5*time.Minute); err != nil {
		t.Fatal(err)
	}
	said := strings.ReplaceAll(p.output(), "\r", "")
	if !strings.Contains(said, "\nVM-OK\n") {
		t.Fatalf("it did not come to its end:\n%s", p.tail())
	}
	return said
}

// needs are the files of modules, those that others need first.
func (m vm) needs(t *testing.T, kernel string) []string {
	t.Helper()
	text, err := os.ReadFile(kernel + "/modules.dep")
	if err != nil {
		t.Fatal(err)
	}
	deps := map[string][]string{}
	for line := range strings.Lines(string(text)) {
		name, needs, _ := strings.Cut(strings.TrimSpace(line), ":")
		deps[name] = strings.Fields(needs)
	}
	var all []string
	seen := map[string]bool{}
	var add func(path string)
	add = func(path string) {
		if seen[path] {
			return
		}
		seen[path] = true
		for _, need := range deps[path] {
			add(need)
		}
		all = append(all, path)
	}
	for _, name := range m.modules {
		for path := range deps {
			if filepath.Base(path) == name+".ko" {
				add(path)
			}
		}
	}
	if len(all) < len(m.modules) {
		t.Fatalf("the kernel has not all of %v", m.modules)
	}
	return all
}

// An archive is written as the kernel reads its first files: cpio's format newc.
type archive struct {
	*bufio.Writer
	inodes int
	err    error
}

func (a *archive) add(name string, mode int, data []byte) {
	if a.err == nil {
		a.err = a.entry(name, mode, int64(len(data)), strings.NewReader(string(data)))
	}
}

func (a *archive) file(name, path string) {
	if a.err != nil {
		return
	}
	f, err := os.Open(path)
	if err != nil {
		a.err = err
		return
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		a.err = err
		return
	}
	a.err = a.entry(name, 0o100755, info.Size(), f)
}

func (a *archive) entry(name string, mode int, size int64, data io.Reader) error {
	a.inodes++
	head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00", a.inodes, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0, name)
	head += strings.Repeat("\x00", -len(head)&3)
	if _, err := a.WriteString(head); err != nil {
		return err
	}
	if _, err := io.Copy(a, data); err != nil {
		return err
	}
	_, err := a.WriteString(strings.Repeat("\x00", int(-size&3)))
	return err
}

// TestBackingNFS: images on NFS, as the kernel's client has it.
func TestBackingNFS(t *testing.T) {
	const serve = `
caddy registry backing-images >>/tmp/log 2>&1 &
server=$!
`
	vm{
		modules: []string{"nfsv3"},
		files:   map[string]string{"caddy": caddyBin, "nfs": tool(t, "nfs")},
		script: `
export LONGHORN_API_URL=http://127.0.0.1:9 STORAGE_BACKEND_TYPE=nfs BACKING_IMAGE_STORAGE_PATH=/mnt
caddy registry backing-images >/tmp/refused 2>&1 && echo "it runs without a mount"
grep -q "is not on NFS" /tmp/refused || cat /tmp/refused
nfs serve 2049 /srv >/tmp/nfs 2>&1 &
nfs mount 2049 /mnt || exit
fail() { cat /tmp/log; poweroff -f; }
` + serve + `
nfs put http://127.0.0.1:8080 image || fail
nfs get http://127.0.0.1:8080 image || fail
kill -9 $server; wait $server
` + serve + `
nfs get http://127.0.0.1:8080 image || fail
nfs put http://127.0.0.1:8080 other || fail
kill $server; wait $server
[ $(find /srv -name data -size +10000k | wc -l) = 1 ] || find /srv
echo VM-OK`,
	}.run(t)
}
