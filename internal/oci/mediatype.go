package oci

import (
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Media types of manifests. The OCI ones come from image-spec; Docker's are
// older and still most common.
const (
	MediaTypeDockerManifest      = "application/vnd.docker.distribution.manifest.v2+json"
	MediaTypeDockerList          = "application/vnd.docker.distribution.manifest.list.v2+json"
	MediaTypeDockerSchema1       = "application/vnd.docker.distribution.manifest.v1+json"
	MediaTypeDockerSchema1Signed = "application/vnd.docker.distribution.manifest.v1+prettyjws"
	MediaTypeOCIArtifact         = "application/vnd.oci.artifact.manifest.v1+json" // withdrawn, still met
)

// ManifestTypes is what is always asked of an upstream, whatever the client
// accepts: several registries convert or hide a manifest according to Accept,
// and one odd client must not decide what a tag means for everyone.
var ManifestTypes = []string{
	v1.MediaTypeImageManifest,
	v1.MediaTypeImageIndex,
	MediaTypeDockerManifest,
	MediaTypeDockerList,
	MediaTypeOCIArtifact,
	MediaTypeDockerSchema1Signed,
	MediaTypeDockerSchema1,
}
