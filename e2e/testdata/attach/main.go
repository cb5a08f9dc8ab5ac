// Command attach attaches an artifact to an image with oras-go, finds it among
// the referrers, pulls it, and prints its digest. The oras program itself cannot
// be had by `go install`.
package main

import (
	"context"
	"fmt"
	"log"
	"os"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/memory"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 4 {
		log.Fatal("usage: USERNAME=… PASSWORD=… attach HOST/REPOSITORY:TAG TYPE TEXT")
	}
	digest, err := attach(context.Background(), os.Args[1], os.Args[2], os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(digest)
}

func attach(ctx context.Context, reference, artifactType, text string) (string, error) {
	repository, err := remote.NewRepository(reference)
	if err != nil {
		return "", err
	}
	repository.PlainHTTP = true
	repository.Client = &auth.Client{Credential: auth.StaticCredential(repository.Reference.Registry,
		auth.Credential{Username: os.Getenv("USERNAME"), Password: os.Getenv("PASSWORD")})}
	subject, err := repository.Resolve(ctx, repository.Reference.Reference)
	if err != nil {
		return "", err
	}

	here := memory.New()
	layer, err := oras.PushBytes(ctx, here, "text/plain", []byte(text))
	if err != nil {
		return "", err
	}
	packed, err := oras.PackManifest(ctx, here, oras.PackManifestVersion1_1, artifactType,
		oras.PackManifestOptions{Subject: &subject, Layers: []v1.Descriptor{layer}})
	if err != nil {
		return "", err
	}
	if err := oras.CopyGraph(ctx, here, repository, packed, oras.DefaultCopyGraphOptions); err != nil {
		return "", err
	}

	var found []v1.Descriptor
	err = repository.Referrers(ctx, subject, artifactType, func(referrers []v1.Descriptor) error {
		found = append(found, referrers...)
		return nil
	})
	if err != nil {
		return "", err
	}
	if len(found) != 1 || found[0].Digest != packed.Digest {
		return "", fmt.Errorf("to %s refer %v, not %s", subject.Digest, found, packed.Digest)
	}
	there := memory.New()
	if err := oras.CopyGraph(ctx, repository, there, found[0], oras.DefaultCopyGraphOptions); err != nil {
		return "", err
	}
	got, err := content.FetchAll(ctx, there, layer)
	if err != nil {
		return "", err
	}
	if string(got) != text {
		return "", fmt.Errorf("the artifact says %q", got)
	}
	return packed.Digest.String(), nil
}
