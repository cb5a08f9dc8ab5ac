// Command hello is what the test image runs: it prints what the layers hold,
// so that one line proves them all.
package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"log"
	"os"
)

func main() {
	log.SetFlags(0)
	greeting, err := os.ReadFile("/etc/greeting")
	if err != nil {
		log.Fatal(err)
	}
	f, err := os.Open("/data/blob")
	if err != nil {
		log.Fatal(err)
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s %x\n", greeting, h.Sum(nil))
}
