package storage

import (
	"os"
	"strings"
	"sync"
)

// Boot names the time since this machine was started: it is the same for every
// process until the next start, and then another. It is empty where that cannot
// be told, which is everywhere but on Linux; every start of a process then
// counts as one after a loss of power.
func Boot() string { return boot() }

var boot = sync.OnceValue(func() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(id))
})
