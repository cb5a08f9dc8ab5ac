// Package layout knows where things lie in a store: the keys of registry:2's
// tree (distribution, registry/storage/paths.go) and of the mirror's own
// records beside it. It knows nothing else.
package layout

import (
	"strings"

	"github.com/opencontainers/go-digest"
)

const (
	root         = "docker/registry/v2/"
	repositories = root + "repositories/"
	records      = "mirror/records/"

	// Repositories is the prefix under which every repository has its place.
	Repositories = repositories
	// Records is the prefix under which every repository has its records.
	Records = records + "repositories/"

	// Session is the key of what is noted of the last process on this machine that
	// changed the store.
	Session = "mirror/local/session.json"
)

// Blob is the key of a blob's bytes. registry:2 keeps every blob under its
// sha256, whatever it was asked for by; see LayerLink.
func Blob(d digest.Digest) string {
	hex := d.Encoded()
	return root + "blobs/" + d.Algorithm().String() + "/" + hex[:2] + "/" + hex + "/data"
}

// LayerLink is the key of the link that makes a blob a member of a
// repository. Its value is the sha256 digest of the bytes, without newline.
func LayerLink(repository string, d digest.Digest) string {
	return Layers(repository) + d.Algorithm().String() + "/" + d.Encoded() + "/link"
}

// Layers is the prefix of all layer links of a repository.
func Layers(repository string) string {
	return repositories + repository + "/_layers/"
}

// Manifests is the prefix of all links of a repository that are not of layers.
func Manifests(repository string) string {
	return repositories + repository + "/_manifests/"
}

// Blobs is the prefix of the blobs whose sha256 begins with two hexadecimal
// digits.
func Blobs(digits string) string {
	return root + "blobs/" + digest.Canonical.String() + "/" + digits + "/"
}

// RevisionLink is the key of the link that makes a manifest a member of a
// repository.
func RevisionLink(repository string, d digest.Digest) string {
	return Revisions(repository) + d.Algorithm().String() + "/" + d.Encoded() + "/link"
}

// Revisions is the prefix of all revision links of a repository.
func Revisions(repository string) string {
	return Manifests(repository) + "revisions/"
}

// Tags is the prefix of all tags of a repository.
func Tags(repository string) string {
	return Manifests(repository) + "tags/"
}

// TagLink is the key of the link from a tag to the manifest it means now.
func TagLink(repository, tag string) string {
	return Tags(repository) + tag + "/current/link"
}

// TagIndex is the prefix of the links that remember what a tag has meant.
func TagIndex(repository, tag string) string {
	return Tags(repository) + tag + "/index/"
}

// TagIndexLink is the key of the link that remembers a digest the tag has had.
func TagIndexLink(repository, tag string, d digest.Digest) string {
	return TagIndex(repository, tag) + d.Algorithm().String() + "/" + d.Encoded() + "/link"
}

// Record is the key of a repository's record. A name's components never begin
// with an underscore, so it collides with no repository.
func Record(repository string) string {
	return records + "repositories/" + repository + "/_record.json"
}

// TagRecord is the key of a tag's record.
func TagRecord(repository, tag string) string {
	return TagRecords(repository) + tag + ".json"
}

// TagRecords is the prefix of the records of a repository's tags.
func TagRecords(repository string) string {
	return records + "repositories/" + repository + "/_tags/"
}

// Pins is the prefix of the pins of a repository and of those whose names begin
// with its, or with "" of all.
func Pins(repository string) string {
	if repository != "" {
		repository += "/"
	}
	return records + "pins/" + repository
}

// Pin is the key of the record that pins a tag, or a manifest if there is none. A
// tag may look like a digest with a dash, and S3 takes a colon badly.
func Pin(repository, tag string, d digest.Digest) string {
	if tag != "" {
		return Pins(repository) + "_tags/" + tag + ".json"
	}
	return Pins(repository) + "_manifests/" + d.Algorithm().String() + "/" + d.Encoded() + ".json"
}

// PinOf reads out of the key of a pin what it pins.
func PinOf(key string) (repository, tag string, d digest.Digest, ok bool) {
	rest, isPin := strings.CutPrefix(key, Pins(""))
	rest, isRecord := strings.CutSuffix(rest, ".json")
	if !isPin || !isRecord {
		return "", "", "", false
	}
	if repository, tag, ok = strings.Cut(rest, "/_tags/"); ok {
		return repository, tag, "", repository != "" && tag != "" && !strings.Contains(tag, "/")
	}
	repository, rest, ok = strings.Cut(rest, "/_manifests/")
	d = digest.Digest(strings.Replace(rest, "/", ":", 1))
	return repository, "", d, ok && repository != "" && d.Validate() == nil
}

// Images is the prefix of the records of all backing images.
const Images = records + "backing-images/"

// Image is the key of the record of a backing image.
func Image(name string) string { return Images + name + "/image.json" }

// ImageVersions is the prefix of the records of a backing image's versions.
func ImageVersions(name string) string { return Images + name + "/versions/" }

// ImageVersion is the key of the record of a version.
func ImageVersion(name, version string) string { return ImageVersions(name) + version + ".json" }

// ImageRegistrations is the prefix of the records of a version's registrations.
func ImageRegistrations(name, version string) string {
	return Images + name + "/registrations/" + version + "/"
}

// ImageRegistration is the key of the record of a version's registration with a
// cluster.
func ImageRegistration(name, version, cluster string) string {
	return ImageRegistrations(name, version) + cluster + ".json"
}

// ImageOf reads out of the key of a record below Images which image it is of, and
// which version's, unless it is the image's own.
func ImageOf(key string) (name, version string, ok bool) {
	rest, isImage := strings.CutPrefix(key, Images)
	rest, isRecord := strings.CutSuffix(rest, ".json")
	parts := strings.Split(rest, "/")
	switch {
	case !isImage || !isRecord:
	case len(parts) == 2 && parts[1] == "image":
		return parts[0], "", true
	case len(parts) == 3 && parts[1] == "versions":
		return parts[0], parts[2], true
	}
	return "", "", false
}

// What is under way with backing images on this machine.
const (
	ImageUploads = "mirror/local/backing-images/uploads/"
	ImageJobs    = "mirror/local/backing-images/jobs/"
	ImageIntents = "mirror/local/backing-images/intents/"
)

// DigestOf reads the digest out of a link's key, as listed under Revisions.
func DigestOf(linkKey string) (digest.Digest, bool) {
	parts := strings.Split(linkKey, "/")
	if len(parts) < 3 || parts[len(parts)-1] != "link" {
		return "", false
	}
	d := digest.Digest(parts[len(parts)-3] + ":" + parts[len(parts)-2])
	return d, d.Validate() == nil
}

// BlobOf reads the digest out of a blob's key, as listed under Blobs.
func BlobOf(key string) (digest.Digest, bool) {
	rest, isData := strings.CutSuffix(strings.TrimPrefix(key, root+"blobs/"), "/data")
	parts := strings.Split(rest, "/")
	if !isData || len(parts) != 3 {
		return "", false
	}
	d := digest.Digest(parts[0] + ":" + parts[2])
	return d, d.Validate() == nil
}
