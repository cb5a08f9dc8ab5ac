// Package failpoint names the places where a process may die between two
// steps of a commit, so that a test can kill it exactly there.
package failpoint

import "sync/atomic"

var hook atomic.Pointer[func(name string)]

// Hit says that the named step has been reached. Without a hook it costs one
// atomic load.
func Hit(name string) {
	if h := hook.Load(); h != nil {
		(*h)(name)
	}
}

// Set installs f, called with the name of every step reached from then on.
// Only tests call it; nil removes it.
func Set(f func(name string)) {
	if f == nil {
		hook.Store(nil)
		return
	}
	hook.Store(&f)
}
