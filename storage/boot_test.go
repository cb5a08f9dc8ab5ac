package storage_test

import (
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/caddy-registry/mirror/storage"
)

func TestBoot(t *testing.T) {
	boot := storage.Boot()
	if boot != storage.Boot() {
		t.Error("the machine was started in between")
	}
	_, err := os.Stat("/proc/sys/kernel/random/boot_id")
	if known := runtime.GOOS == "linux" && err == nil; known != (boot != "") || strings.TrimSpace(boot) != boot {
		t.Errorf("Boot is %q", boot)
	}
}
