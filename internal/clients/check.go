package clients

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/caddy-registry/mirror/internal/oci"
)

// An Image is one to be pulled for a test.
type Image struct{ Registry, Name, Reference string }

// ParseImage reads the name of an image in full: docker.io/library/alpine:3.
func ParseImage(s string) (Image, error) {
	registry, rest, ok := strings.Cut(s, "/")
	if !ok || !strings.ContainsAny(registry, ".:") {
		return Image{}, fmt.Errorf("%q does not name an image in full, such as docker.io/library/alpine:3", s)
	}
	name, reference, found := strings.Cut(rest, "@")
	if !found {
		name, reference = rest, "latest"
		if i := strings.LastIndexByte(rest, ':'); i >= 0 {
			name, reference = rest[:i], rest[i+1:]
		}
	}
	if _, err := oci.ParseReference(reference); err != nil || !oci.ValidName(name) {
		return Image{}, fmt.Errorf("%q does not name an image in full, such as docker.io/library/alpine:3", s)
	}
	return Image{registry, name, reference}, nil
}

const (
	checkPatience = 30 * time.Second // for the header of an answer
	maxChecked    = 4 << 20          // bytes of a manifest
	maxTold       = 64 << 10         // bytes of an error
)

// Check pulls an image by way of the mirror as a client would: the manifest by its
// tag, then by digest, a layer from its middle on as after a cut, and whole. Each thing
// that is right is told of; the error says what is wrong and what to do.
func Check(ctx context.Context, client Client, m Mirror, image Image, told func(string)) error {
	if !client.All && image.Registry != "docker.io" || !m.Every && !m.has(image.Registry) {
		return fmt.Errorf("%s is not set up by this: give another --image", image.Registry)
	}
	c := checker{Mirror: m, client: client, image: image, told: told}
	transport := &http.Transport{Proxy: http.ProxyFromEnvironment, ResponseHeaderTimeout: checkPatience, DisableCompression: true}
	if m.CA != "" {
		pem, err := os.ReadFile(m.CA)
		if err != nil {
			return err
		}
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM(pem) {
			return fmt.Errorf("%s has no certificate", m.CA)
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	defer transport.CloseIdleConnections()
	c.http = &http.Client{Transport: transport}
	if err := c.ping(ctx); err != nil {
		return err
	}
	manifest, err := c.manifests(ctx)
	if err != nil {
		return err
	}
	return c.layer(ctx, manifest)
}

type checker struct {
	Mirror
	client Client
	image  Image
	http   *http.Client
	told   func(string)
}

func (c *checker) get(ctx context.Context, method, path, ranges string) (*http.Response, error) {
	to := c.URL + path
	if path != "/v2/" {
		name, query := c.image.Name, "?ns="+c.image.Registry
		switch {
		case c.client.ByPath:
			of := Registry{Name: c.image.Registry}
			if i := slices.IndexFunc(c.Registries, func(r Registry) bool { return r.Name == of.Name }); i >= 0 {
				of = c.Registries[i]
			}
			name, query = of.inPath()+"/"+name, ""
		case !c.client.All:
			query = "" // docker means the default
		}
		to = c.URL + "/v2/" + name + path + query
	}
	req, err := http.NewRequestWithContext(ctx, method, to, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", strings.Join(oci.ManifestTypes, ", ")+", */*")
	if ranges != "" {
		req.Header.Set("Range", ranges)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.unreachable(err)
	}
	if encoding := resp.Header.Get("Content-Encoding"); encoding != "" {
		resp.Body.Close()
		return nil, fmt.Errorf("the answer to %s is compressed (%s), which breaks digests: a proxy in front of the mirror must leave /v2/ as it is", to, encoding)
	}
	return resp, nil
}

// unreachable says why nothing answers.
func (c *checker) unreachable(err error) error {
	var name *net.DNSError
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	var timeout net.Error
	switch {
	case errors.As(err, &name):
		return fmt.Errorf("the name %s is not known here: mend DNS, or use the mirror's address: %w", c.host(), err)
	case errors.As(err, &unknown):
		return fmt.Errorf("this machine does not trust who has signed the mirror's certificate: give the authority by --ca: %w", err)
	case errors.As(err, &host):
		return fmt.Errorf("the mirror's certificate is for another name: use that one: %w", err)
	case errors.As(err, &invalid):
		return fmt.Errorf("the mirror's certificate is not valid now; is this machine's clock right? %w", err)
	case strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return fmt.Errorf("%s has no TLS: write http://%[1]s: %w", c.host(), err)
	case errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Errorf("%s does not answer in time: look for a firewall in between, or at the mirror's log: %w", c.host(), err)
	}
	return fmt.Errorf("%s cannot be reached: is the mirror running, and the port right? %w", c.host(), err)
}

func (c *checker) ping(ctx context.Context) error {
	begun := time.Now()
	resp, err := c.get(ctx, http.MethodGet, "/v2/", "")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusUnauthorized:
		return fmt.Errorf("%s asks for credentials, and docker and containerd send a mirror none unless they are set for it", c.URL)
	default:
		return fmt.Errorf("%s answers /v2/ with %s: no registry is at this address, or a proxy in front of it does not pass /v2/ on", c.URL, resp.Status)
	}
	c.told(fmt.Sprintf("%s is a registry (%s)", c.URL, since(begun)))
	return nil
}

func since(begun time.Time) string { return time.Since(begun).Round(time.Millisecond).String() }

// refused is what the mirror says of an error.
func (c *checker) refused(what string, resp *http.Response) error {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxTold))
	var says struct {
		Errors []struct {
			Code, Message string
		} `json:"errors"`
	}
	if json.Unmarshal(body, &says) != nil || len(says.Errors) == 0 {
		return fmt.Errorf("%s: %s", what, resp.Status)
	}
	return fmt.Errorf("%s: %s: %s: %s", what, resp.Status, says.Errors[0].Code, says.Errors[0].Message)
}

// manifests asks what the tag means, and returns the manifest of this machine's
// platform.
func (c *checker) manifests(ctx context.Context) (*oci.Manifest, error) {
	begun, of := time.Now(), c.image.Registry+"/"+c.image.Name
	resp, err := c.get(ctx, http.MethodHead, "/manifests/"+c.image.Reference, "")
	if err != nil {
		return nil, err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		if resp, err = c.get(ctx, http.MethodGet, "/manifests/"+c.image.Reference, ""); err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			return nil, fmt.Errorf("%s:%s can be had by GET and not by HEAD: a proxy in front of the mirror drops HEAD", of, c.image.Reference)
		}
		return nil, c.refused(of+":"+c.image.Reference, resp)
	}
	is, err := oci.ParseDigest(resp.Header.Get("Docker-Content-Digest"))
	if err != nil || resp.ContentLength < 0 {
		return nil, errors.New("the mirror does not say which digest and length a tag has: a proxy in front of it drops Docker-Content-Digest or Content-Length")
	}
	c.told(fmt.Sprintf("%s is %s (%s)", c.image.Reference, is, since(begun)))
	for range 2 {
		m, err := c.manifest(ctx, is)
		if err != nil {
			return nil, err
		}
		if len(m.Children) == 0 {
			return m, nil
		}
		if is = platform(m.Children); is == "" {
			return nil, fmt.Errorf("%s is of no platform that is known here: give another --image", of)
		}
	}
	return nil, fmt.Errorf("%s is an index of indexes: give another --image", of)
}

// platform is the child of an index that is for this kind of machine, or the first.
func platform(children []v1.Descriptor) digest.Digest {
	var first digest.Digest
	for _, child := range children {
		switch p := child.Platform; {
		case p != nil && p.OS == "linux" && p.Architecture == runtime.GOARCH:
			return child.Digest
		case first == "" && (p == nil || p.OS != "unknown"):
			first = child.Digest
		}
	}
	return first
}

func (c *checker) manifest(ctx context.Context, is digest.Digest) (*oci.Manifest, error) {
	begun := time.Now()
	resp, err := c.get(ctx, http.MethodGet, "/manifests/"+is.String(), "")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, c.refused("the manifest "+is.String(), resp)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxChecked+1))
	if err != nil {
		return nil, fmt.Errorf("the manifest %s was cut: %w", is, err)
	}
	if is.Algorithm().FromBytes(body) != is {
		return nil, fmt.Errorf("the manifest %s has other bytes: something in front of the mirror changes answers", is)
	}
	m, err := oci.ParseManifest(body)
	if err == nil {
		c.told(fmt.Sprintf("manifest %s, %d bytes (%s)", is, len(body), since(begun)))
	}
	return m, err
}

// layer fetches the largest blob from its middle on, and then whole.
func (c *checker) layer(ctx context.Context, m *oci.Manifest) error {
	var of v1.Descriptor
	for _, blob := range m.Blobs {
		if blob.Size > of.Size && blob.Digest.Algorithm() == digest.SHA256 {
			of = blob
		}
	}
	if of.Size < 2 {
		return errors.New("the image has no layer: give another --image")
	}
	middle := of.Size / 2
	begun := time.Now()
	resp, err := c.get(ctx, http.MethodGet, "/blobs/"+of.Digest.String(), "bytes="+strconv.FormatInt(middle, 10)+"-")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	want := fmt.Sprintf("bytes %d-%d/%d", middle, of.Size-1, of.Size)
	switch {
	case resp.StatusCode == http.StatusOK:
		return errors.New("a range of a layer is answered with all of it, and so a cut pull begins anew: a proxy in front of the mirror drops Range")
	case resp.StatusCode != http.StatusPartialContent:
		return c.refused("a range of the layer "+of.Digest.String(), resp)
	case resp.Header.Get("Content-Range") != want:
		return fmt.Errorf("the Content-Range of a layer's second half is %q, and not %q: something in front of the mirror changes it", resp.Header.Get("Content-Range"), want)
	}
	half := sha256.New()
	n, err := oci.Feed(ctx, half, resp.Body)
	if err == nil && n != of.Size-middle {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("the layer %s was cut after %d bytes of its second half: look at the mirror's log: %w", of.Digest, n, err)
	}
	c.told(fmt.Sprintf("layer %s from byte %d on (%s)", of.Digest, middle, since(begun)))

	begun = time.Now()
	whole, err := c.get(ctx, http.MethodGet, "/blobs/"+of.Digest.String(), "")
	if err != nil {
		return err
	}
	defer whole.Body.Close()
	if whole.StatusCode != http.StatusOK {
		return c.refused("the layer "+of.Digest.String(), whole)
	}
	all, second := sha256.New(), sha256.New()
	n, err = oci.Feed(ctx, all, io.LimitReader(whole.Body, middle))
	if err == nil {
		var rest int64
		rest, err = oci.Feed(ctx, io.MultiWriter(all, second), whole.Body)
		n += rest
	}
	if err == nil && n != of.Size {
		err = io.ErrUnexpectedEOF
	}
	switch {
	case err != nil:
		return fmt.Errorf("the layer %s was cut after %d bytes of %d: look at the mirror's log: %w", of.Digest, n, of.Size, err)
	case digest.NewDigest(digest.SHA256, all) != of.Digest:
		return fmt.Errorf("the layer %s has other bytes: something in front of the mirror changes answers", of.Digest)
	case string(half.Sum(nil)) != string(second.Sum(nil)):
		return fmt.Errorf("the second half of the layer %s is another alone than in the whole: something in front of the mirror caches ranges wrongly", of.Digest)
	}
	c.told(fmt.Sprintf("layer %s, %d bytes (%s)", of.Digest, n, since(begun)))
	return nil
}
