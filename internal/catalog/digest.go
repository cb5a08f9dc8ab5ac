package catalog

import (
	"encoding/hex"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/caddy-registry/mirror/internal/oci"
)

// pack makes a digest half as long, and "" of what is none.
func pack(d digest.Digest) string {
	if _, err := oci.ParseDigest(d.String()); err != nil {
		return ""
	}
	raw, _ := hex.DecodeString(d.Encoded())
	return string(raw)
}

// unpack undoes pack: no two algorithms have digests of one length.
func unpack(raw []byte) digest.Digest {
	algorithm := digest.SHA256
	switch len(raw) {
	case 48:
		algorithm = digest.SHA384
	case 64:
		algorithm = digest.SHA512
	}
	return digest.NewDigestFromEncoded(algorithm, hex.EncodeToString(raw))
}

// seconds is a time in the database.
func seconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return max(t.Unix(), 1)
}

func fromSeconds(s int64) time.Time {
	if s == 0 {
		return time.Time{}
	}
	return time.Unix(s, 0).UTC()
}
