package regtest

import (
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
)

var handed sync.Map // ports that FreeAddress has given out

// FreeAddress is a loopback address that nothing listens on. Its port is below
// those that the kernel gives to connections and to listeners that name none: one
// of these could be taken between now and its use.
func FreeAddress(t testing.TB) string {
	t.Helper()
	for range 1000 {
		address := fmt.Sprintf("127.0.0.1:%d", 10_000+rand.IntN(22_000))
		if _, used := handed.LoadOrStore(address, true); used {
			continue
		}
		if listener, err := net.Listen("tcp", address); err == nil {
			listener.Close()
			return address
		}
	}
	t.Fatal("no free port from 10000 to 32000")
	return ""
}
