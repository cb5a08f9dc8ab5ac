// Command cimg copies an image with github.com/containers/image as podman,
// skopeo and CRI-O have it today: Debian's does not resume.
package main

import (
	"context"
	"log"
	"os"
	"strings"

	"github.com/containers/image/v5/copy"
	"github.com/containers/image/v5/docker"
	"github.com/containers/image/v5/oci/layout"
	"github.com/containers/image/v5/signature"
	"github.com/containers/image/v5/types"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 4 {
		log.Fatal("usage: cimg REGISTRIES_CONF docker://IMAGE DIR")
	}
	source, err := docker.ParseReference(strings.TrimPrefix(os.Args[2], "docker:"))
	if err != nil {
		log.Fatal(err)
	}
	target, err := layout.ParseReference(os.Args[3] + ":latest")
	if err != nil {
		log.Fatal(err)
	}
	policy, err := signature.NewPolicyContext(&signature.Policy{Default: []signature.PolicyRequirement{signature.NewPRInsecureAcceptAnything()}})
	if err != nil {
		log.Fatal(err)
	}
	system := &types.SystemContext{SystemRegistriesConfPath: os.Args[1], SystemRegistriesConfDirPath: "/nonexistent"}
	if _, err := copy.Image(context.Background(), policy, target, source, &copy.Options{SourceCtx: system, ReportWriter: os.Stderr}); err != nil {
		log.Fatal(err)
	}
}
