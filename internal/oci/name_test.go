package oci

import (
	"regexp"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

// The grammar as github.com/distribution/reference v0.6.0 has it (regexp.go:
// remoteName and tag, anchored), which every Docker client uses. Written out,
// since the module does not otherwise depend on it.
var (
	referenceName = regexp.MustCompile(`^[a-z0-9]+(?:(?:[._]|__|[-]+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|[-]+)[a-z0-9]+)*)*$`)
	referenceTag  = regexp.MustCompile(`^[\w][\w.-]{0,127}$`)
)

const (
	hex256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	hex512 = "cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce" +
		"47d0d13c5d85f2b0ff8318d2877eec2f63b931bd47417a81a538327af927da3e"
	hex384 = "38b060a751ac96384cd9327eb1b1e36a21fdb71114be07434c0cc7bf63f6e1da274edebfe76f65fbd51ad2f14898b95b"
)

var nameSeeds = []struct {
	name string
	want bool
}{
	{"nginx", true},
	{"library/nginx", true},
	{"0", true},
	{"a/b/c/d/e/f/g", true},
	{"a.b", true},
	{"a_b", true},
	{"a__b", true},
	{"a-b", true},
	{"a----b", true},
	{"gcr.io/google.com/project/x", true},
	{"registry.corp__5000/team/app", true},
	{"blobs/manifests/uploads", true},
	{"a-b_c.d__e", true},
	{strings.Repeat("a", 255), true},
	{strings.Repeat("a/", 127) + "a", true},

	{"", false},
	{"/", false},
	{"/a", false},
	{"a/", false},
	{"a//b", false},
	{"A", false},
	{"a/B", false},
	{"a..b", false},
	{"a___b", false},
	{"a._b", false},
	{"a-_b", false},
	{"a.-b", false},
	{"-a", false},
	{"a-", false},
	{".a", false},
	{"a.", false},
	{"_a", false},
	{"a_", false},
	{"a/_manifests", false},
	{"..", false},
	{"a/../b", false},
	{"a/./b", false},
	{"a:b", false},
	{"a@b", false},
	{"a b", false},
	{"a\n", false},
	{"a\x00", false},
	{"ä", false},
	{"a%2fb", false},
	{"a\\b", false},
	{strings.Repeat("a", 256), false},
}

func TestValidName(t *testing.T) {
	for _, c := range nameSeeds {
		if got := ValidName(c.name); got != c.want {
			t.Errorf("ValidName(%q) = %v, want %v", c.name, got, c.want)
		}
	}
}

func TestValidComponent(t *testing.T) {
	for _, c := range nameSeeds {
		if strings.Contains(c.name, "/") {
			if ValidComponent(c.name) {
				t.Errorf("ValidComponent(%q): a slash is no part of a component", c.name)
			}
		} else if got := ValidComponent(c.name); got != c.want && len(c.name) <= MaxNameLength {
			t.Errorf("ValidComponent(%q) = %v, want %v", c.name, got, c.want)
		}
	}
}

func FuzzValidName(f *testing.F) {
	for _, c := range nameSeeds {
		f.Add(c.name)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, want := ValidName(s), len(s) <= MaxNameLength && referenceName.MatchString(s)
		if got != want {
			t.Errorf("ValidName(%q) = %v, and distribution/reference says %v", s, got, want)
		}
		if got && (strings.Contains(s, "..") || strings.HasPrefix(s, "/") || strings.Contains(s, "/_")) {
			t.Errorf("ValidName(%q): would leave its place in the store", s)
		}
		if got {
			for part := range strings.SplitSeq(s, "/") {
				if !ValidComponent(part) {
					t.Errorf("ValidName(%q), but not ValidComponent(%q)", s, part)
				}
			}
		}
	})
}

var tagSeeds = []struct {
	tag  string
	want bool
}{
	{"latest", true},
	{"v1.2.3-rc.1", true},
	{"_x", true},
	{"0", true},
	{"A.B-C_D", true},
	{"sha256-" + hex256, true},
	{"sha256-" + hex256 + ".sig", true},
	{strings.Repeat("x", 128), true},

	{"", false},
	{".x", false},
	{"-x", false},
	{"a/b", false},
	{"a:b", false},
	{"a@b", false},
	{"a+b", false},
	{"a b", false},
	{"a\n", false},
	{"..", false},
	{"é", false},
	{strings.Repeat("x", 129), false},
}

func TestValidTag(t *testing.T) {
	for _, c := range tagSeeds {
		if got := ValidTag(c.tag); got != c.want {
			t.Errorf("ValidTag(%q) = %v, want %v", c.tag, got, c.want)
		}
	}
}

func FuzzValidTag(f *testing.F) {
	for _, c := range tagSeeds {
		f.Add(c.tag)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if got, want := ValidTag(s), referenceTag.MatchString(s); got != want {
			t.Errorf("ValidTag(%q) = %v, and distribution/reference says %v", s, got, want)
		}
	})
}

func TestParseDigest(t *testing.T) {
	for _, s := range []string{"sha256:" + hex256, "sha384:" + hex384, "sha512:" + hex512} {
		d, err := ParseDigest(s)
		if err != nil || d.String() != s {
			t.Errorf("ParseDigest(%q) = %q, %v", s, d, err)
		}
		if err == nil && d.Algorithm().FromBytes(nil) != d {
			t.Errorf("%s cannot be verified", s)
		}
	}
	for _, s := range []string{
		"", ":", "sha256", "sha256:", "sha256:baddigeststring",
		"sha256:" + hex256[1:], "sha256:" + hex256 + "0",
		"sha256:" + strings.ToUpper(hex256), "SHA256:" + hex256,
		"sha256:" + hex512, "sha512:" + hex256,
		"md5:d41d8cd98f00b204e9800998ecf8427e",
		"sha256:" + strings.Repeat("../", 21) + "x",
		" sha256:" + hex256, "sha256:" + hex256 + "\n",
		"sha256+b64:" + hex256,
	} {
		if d, err := ParseDigest(s); err == nil || d != "" {
			t.Errorf("ParseDigest(%q) = %q, %v, want an error", s, d, err)
		}
	}
}

func TestParseReference(t *testing.T) {
	for _, c := range []struct {
		in     string
		want   Reference
		joined string
	}{
		{"latest", Reference{Tag: "latest"}, "a/b:latest"},
		{"sha256-" + hex256, Reference{Tag: "sha256-" + hex256}, "a/b:sha256-" + hex256},
		{"sha256", Reference{Tag: "sha256"}, "a/b:sha256"},
		{"sha256:" + hex256, Reference{Digest: "sha256:" + hex256}, "a/b@sha256:" + hex256},
		{"sha512:" + hex512, Reference{Digest: "sha512:" + hex512}, "a/b@sha512:" + hex512},
	} {
		got, err := ParseReference(c.in)
		if err != nil || got != c.want {
			t.Errorf("ParseReference(%q) = %+v, %v, want %+v", c.in, got, err, c.want)
			continue
		}
		if got.String() != c.in {
			t.Errorf("%+v prints as %q", got, got.String())
		}
		if joined := got.Join("a/b"); joined != c.joined {
			t.Errorf("Join = %q, want %q", joined, c.joined)
		}
	}
	for _, s := range []string{"", "sha256:baddigeststring", "a:b", ":", "tag:" + hex256, "-x", "a/b", "../x", strings.Repeat("x", 129)} {
		if got, err := ParseReference(s); err == nil {
			t.Errorf("ParseReference(%q) = %+v, want an error", s, got)
		}
	}
}

func FuzzParseReference(f *testing.F) {
	for _, c := range tagSeeds {
		f.Add(c.tag)
	}
	f.Add("sha256:" + hex256)
	f.Add("sha512:" + hex512)
	f.Add("sha256:" + strings.ToUpper(hex256))
	f.Add("sha256:baddigeststring")
	f.Fuzz(func(t *testing.T, s string) {
		ref, err := ParseReference(s)
		if err != nil {
			return
		}
		if (ref.Tag == "") == (ref.Digest == "") {
			t.Fatalf("ParseReference(%q) = %+v: want a tag or a digest", s, ref)
		}
		if ref.String() != s {
			t.Errorf("ParseReference(%q) prints as %q", s, ref)
		}
		if ref.Tag != "" && !referenceTag.MatchString(ref.Tag) {
			t.Errorf("ParseReference(%q): tag %q", s, ref.Tag)
		}
		if ref.Digest != "" && (ref.Digest.Validate() != nil || !ref.Digest.Algorithm().Available()) {
			t.Errorf("ParseReference(%q): digest %q", s, ref.Digest)
		}
	})
}

func TestFallbackTag(t *testing.T) {
	for _, c := range []struct {
		subject digest.Digest
		want    string
	}{
		{"sha256:" + hex256, "sha256-" + hex256},
		{"sha512:" + hex512, "sha512-" + hex512[:64]},
		{digest.Digest("sha512+b64u:" + strings.Repeat("=", 70)), "sha512-b64u-" + strings.Repeat("-", 64)},
		{digest.Digest(strings.Repeat("a", 40) + ":xyz"), strings.Repeat("a", 32) + "-xyz"},
	} {
		got := FallbackTag(c.subject)
		if got != c.want {
			t.Errorf("FallbackTag(%s) = %s, want %s", c.subject, got, c.want)
		}
		if !ValidTag(got) {
			t.Errorf("FallbackTag(%s) = %s is no tag", c.subject, got)
		}
	}
}
