package fill

import "github.com/opencontainers/go-digest"

// A File is content in a file, with the digests that its bytes have.
type File struct {
	Path           string
	Size           int64 // in bytes
	SHA256, SHA512 digest.Digest
}
