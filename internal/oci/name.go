package oci

import (
	_ "crypto/sha256" // so that its digests can be made and verified
	_ "crypto/sha512" // likewise
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"
)

// MaxNameLength bounds a repository name. Many clients limit host, slash and
// name together to 255 bytes (spec, "Pulling manifests"), so nothing longer
// can be asked for by a well-behaved one.
const MaxNameLength = 255

// ValidName reports whether s is a repository name: path components of lower
// case letters and digits, joined inside by one '.', one or two '_' or any
// number of '-', and separated by '/' (spec, "Pulling manifests").
//
// It is written out because it stands on the path of every request.
func ValidName(s string) bool {
	if s == "" || len(s) > MaxNameLength {
		return false
	}
	for component := range strings.SplitSeq(s, "/") {
		if !ValidComponent(component) {
			return false
		}
	}
	return true
}

// ValidComponent reports whether s is one path component of a repository name.
func ValidComponent(s string) bool {
	for i := 0; i < len(s); {
		start := i
		for i < len(s) && isAlphanumeric(s[i]) {
			i++
		}
		if i == start {
			return false
		}
		if i == len(s) {
			return true
		}
		start = i
		for i < len(s) && !isAlphanumeric(s[i]) {
			i++
		}
		switch separator := s[start:i]; {
		case separator == ".", separator == "_", separator == "__":
		case strings.Trim(separator, "-") == "":
		default:
			return false
		}
	}
	return false // empty, or ends in a separator
}

func isAlphanumeric(c byte) bool {
	return 'a' <= c && c <= 'z' || '0' <= c && c <= '9'
}

// ValidTag reports whether s is a tag: up to 128 letters, digits, '.', '_' and
// '-', not beginning with '.' or '-' (spec, "Pulling manifests").
func ValidTag(s string) bool {
	if s == "" || len(s) > 128 || s[0] == '.' || s[0] == '-' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !isAlphanumeric(c) && (c < 'A' || c > 'Z') && c != '.' && c != '_' && c != '-' {
			return false
		}
	}
	return true
}

// ParseDigest checks that s is a digest of an algorithm this program can
// verify: sha256, sha384 or sha512.
func ParseDigest(s string) (digest.Digest, error) {
	if hex, ok := strings.CutPrefix(s, "sha256:"); ok && len(hex) == 64 && isHex(hex) {
		return digest.Digest(s), nil
	}
	d, err := digest.Parse(s)
	if err != nil {
		return "", fmt.Errorf("digest %.100q: %w", s, err)
	}
	return d, nil
}

func isHex(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// A Reference is what stands behind /manifests/: a tag or a digest.
type Reference struct {
	Tag    string
	Digest digest.Digest
}

// ParseReference takes a manifest reference apart. Whatever contains a colon
// must be a digest, since a tag cannot.
func ParseReference(s string) (Reference, error) {
	if strings.Contains(s, ":") {
		d, err := ParseDigest(s)
		return Reference{Digest: d}, err
	}
	if !ValidTag(s) {
		return Reference{}, fmt.Errorf("tag %.150q: want up to 128 letters, digits, '.', '_' or '-'", s)
	}
	return Reference{Tag: s}, nil
}

func (r Reference) String() string {
	if r.Tag != "" {
		return r.Tag
	}
	return r.Digest.String()
}

// Join appends the reference to a repository name as people write it:
// name:tag or name@digest.
func (r Reference) Join(name string) string {
	if r.Tag != "" {
		return name + ":" + r.Tag
	}
	return name + "@" + r.Digest.String()
}

// FallbackTag is the tag under which a registry without the referrers API
// keeps the list of a subject's referrers (spec, "Referrers tag schema").
func FallbackTag(subject digest.Digest) string {
	algorithm, encoded := subject.Algorithm().String(), subject.Encoded()
	return fallbackPart(algorithm, 32) + "-" + fallbackPart(encoded, 64)
}

func fallbackPart(s string, limit int) string {
	if len(s) > limit {
		s = s[:limit]
	}
	return strings.Map(func(r rune) rune {
		if r < 128 && (isAlphanumeric(byte(r)) || 'A' <= r && r <= 'Z' || r == '.' || r == '_' || r == '-') {
			return r
		}
		return '-'
	}, s)
}
