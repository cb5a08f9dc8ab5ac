package module

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/caddy-registry/mirror/internal/backing"
)

// imageCmd is the command for backing images. It asks the site of backing_images and
// not the admin API, which ends a request after ten seconds.
func imageCmd() *cobra.Command {
	image := &cobra.Command{
		Use:   "image",
		Short: "Makes, shows and deletes backing images",
		Long: `
Talks to a server of backing images: ` + "`caddy registry backing-images`" + `, or a site
with the directive backing_images.

An image is named as debian, one of its versions as debian:v3, debian:stable by a
tag, or debian@sha512:<digest>. A name alone means the version that the tag latest
does, or the one made last.
`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	flags := image.PersistentFlags()
	flags.String("url", "http://127.0.0.1:8080", "The address of the server")
	flags.String("token", "", "Its token; without this, that of the environment: BACKING_IMAGE_API_TOKEN")

	add := &cobra.Command{
		Use:   "add <name> <file>|-|<url>",
		Short: "Uploads a file, or what comes in on stdin, as a version of an image",
		Long: `
Uploads a file as a version of an image, and prints the version. An upload that is
cut goes on where it was, for as long as the command runs. What comes in on stdin
("-") is sent in one piece. An http or https URL is pulled by the server, as by
the command pull.
`,
		Example: "  caddy registry image add debian ./debian-13.qcow2 --tag stable",
		Args:    cobra.ExactArgs(2),
		RunE:    imageAdd,
	}
	pull := &cobra.Command{
		Use:   "pull <name> <url>",
		Short: "Has the server pull a version of an image from a URL",
		Long: `
Has the server pull a URL, follows that to its end, and prints the version. Whoever
interrupts it leaves the pull to the server.
`,
		Example: "  caddy registry image pull debian https://cloud.debian.org/images/cloud/trixie/latest/debian-13-generic-amd64.qcow2",
		Args:    cobra.ExactArgs(2),
		RunE:    imagePull,
	}
	for _, cmd := range []*cobra.Command{add, pull} {
		flags := cmd.Flags()
		flags.String("version", "", "The version's name; without it the next of v1, v2, ...")
		flags.StringSlice("tag", nil, "A tag to set on it; may be repeated")
		flags.StringSlice("label", nil, "A label of the image, key=value; may be repeated")
		flags.String("sha512", "", "What the file as it comes must have, in hexadecimal")
		flags.String("sha256", "", "The same with sha256")
		flags.String("decompress", "", "auto, gz, xz or zst: keep what is in the file")
		flags.StringSlice("register", nil, "A Longhorn cluster to register it with; may be repeated")
		flags.Bool("detach", false, "Print a pull's job and do not wait for its end")
	}
	ls := &cobra.Command{
		Use:   "ls",
		Short: "Lists images",
		Args:  cobra.NoArgs,
		RunE:  imageList,
	}
	ls.Flags().String("label", "", "Only those with a label: key, or key=value")
	show := &cobra.Command{
		Use:     "show <image>",
		Short:   "Shows an image with its versions, or one version",
		Example: "  caddy registry image show debian:stable",
		Args:    cobra.ExactArgs(1),
		RunE:    imageShow,
	}
	get := &cobra.Command{
		Use:   "get <image> [<file>]",
		Short: "Downloads an image, and goes on with a download that was cut",
		Long: `
Downloads a version into a file, by default one of the name that the server gives
it, and compares its digest. What has come of a download that was cut is in
<file>.part, and the same command goes on with it.
`,
		Args: cobra.RangeArgs(1, 2),
		RunE: imageGet,
	}
	tag := &cobra.Command{
		Use:     "tag <image> <tag>",
		Short:   "Has a tag mean a version, or removes it",
		Example: "  caddy registry image tag debian:v3 stable",
		Args:    cobra.ExactArgs(2),
		RunE:    imageTag,
	}
	tag.Flags().Bool("delete", false, "Remove the tag")
	rm := &cobra.Command{
		Use:   "rm <image>",
		Short: "Deletes a version, or with --all an image",
		Long: `
Deletes a version. What stands against it is told: a tag, a protection, a
registration with Longhorn, a volume.
`,
		Args: cobra.ExactArgs(1),
		RunE: imageRemove,
	}
	rm.Flags().Bool("all", false, "Delete the image with all its versions")
	rm.Flags().Bool("unregister", false, "Delete it in Longhorn first, which refuses that while a volume uses it")
	register := &cobra.Command{
		Use:     "register <image>",
		Short:   "Registers a version with Longhorn",
		Example: "  caddy registry image register debian:v3 --wait",
		Args:    cobra.ExactArgs(1),
		RunE:    imageRegister,
	}
	register.Flags().String("cluster", "", "Which Longhorn; needed if there are several")
	register.Flags().String("mode", "", "download or upload; without it the cluster's")
	register.Flags().String("name", "", "The name in Longhorn; without it one made of the image's name and digest")
	register.Flags().Int("copies", 0, "How many copies Longhorn keeps at least; without it Longhorn's default")
	register.Flags().Bool("ensure", false, "Have it made again if it is lost there")
	register.Flags().Bool("wait", false, "Wait until Longhorn has it")
	register.Flags().Bool("delete", false, "Delete it in Longhorn, and the registration")
	register.Flags().Bool("forget", false, "Remove the registration here, and leave Longhorn alone: for a cluster that is no more")
	register.MarkFlagsMutuallyExclusive("delete", "forget")
	image.AddCommand(add, pull, ls, show, get, tag, rm, register)
	return image
}

// imageAPI is the API of a server of backing images.
type imageAPI struct {
	base   string // without a slash at its end
	token  string
	client *http.Client
}

// headerPatience is how long a server may take to begin its answer to a question;
// after the last byte of an upload it reads the whole file again, and has no bound.
const headerPatience = time.Minute

// imageServer finds the server that a command is for.
func imageServer(cmd *cobra.Command) (*imageAPI, error) {
	address, err := cmd.Flags().GetString("url")
	if err != nil {
		return nil, err
	}
	token, err := cmd.Flags().GetString("token")
	if err != nil {
		return nil, err
	}
	u, err := url.Parse(strings.TrimRight(address, "/"))
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.RawQuery != "" {
		return nil, fmt.Errorf("--url: %q is no address such as http://127.0.0.1:8080", address)
	}
	return &imageAPI{
		base:   u.String(),
		token:  strings.TrimSpace(cmp.Or(token, os.Getenv("BACKING_IMAGE_API_TOKEN"))),
		client: &http.Client{CheckRedirect: sameHost},
	}, nil
}

// sameHost keeps a token from being sent elsewhere, and a body from being lost.
func sameHost(req *http.Request, via []*http.Request) error {
	if len(via) > 5 || req.URL.Host != via[0].URL.Host || req.URL.Scheme != via[0].URL.Scheme {
		return fmt.Errorf("the server sends this on to %s; give that by --url", req.URL.Host)
	}
	return nil
}

// send sends a request and returns an answer that is no error.
func (a *imageAPI) send(req *http.Request) (*http.Response, error) {
	if a.token != "" {
		req.Header.Set("Authorization", "Bearer "+a.token)
	}
	resp, err := a.client.Do(req)
	if err != nil {
		var failed *url.Error
		if errors.As(err, &failed) {
			err = failed.Err
		}
		return nil, fmt.Errorf("asking %s (another server is named by --url): %w", a.base, err)
	}
	if resp.StatusCode >= 400 {
		defer resp.Body.Close()
		return nil, readProblem(resp)
	}
	return resp, nil
}

// problem is an answer that is an error, as a server of backing images gives it.
type problem struct {
	Status   int               `json:"status"`
	Code     backing.Code      `json:"code"`
	Title    string            `json:"title"`
	Detail   string            `json:"detail"`
	Blockers []backing.Blocker `json:"blockers"`
}

func (p *problem) Error() string {
	text := cmp.Or(p.Detail, p.Title)
	for _, b := range p.Blockers {
		text += fmt.Sprintf("\n  %s %s", b.Kind, b.Name)
		if b.Cluster != "" {
			text += " in " + b.Cluster
		}
	}
	return text
}

// misplaced reports whether an upload ends elsewhere than its client believes: of
// another server's 409 nothing more is known.
func (p *problem) misplaced() bool {
	return p.Status == http.StatusConflict && (p.Code == "" || p.Code == "offset_conflict")
}

func readProblem(resp *http.Response) error {
	p := problem{Title: resp.Status}
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil || json.Unmarshal(body, &p) != nil || p.Code == "" && p.Detail == "" {
		p = problem{Title: fmt.Sprintf("%s answers %s; is it a server of backing images?", resp.Request.URL.Host, resp.Status)}
	}
	p.Status = resp.StatusCode
	return &p
}

// ask puts a question, or none with nil, and reads the answer, unless it is nil.
func (a *imageAPI) ask(ctx context.Context, method, path string, question, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, headerPatience)
	defer cancel()
	body := io.Reader(http.NoBody)
	if question != nil {
		encoded, err := json.Marshal(question)
		if err != nil {
			return err
		}
		body = bytes.NewReader(encoded)
	}
	req, err := http.NewRequestWithContext(ctx, method, a.base+path, body)
	if err != nil {
		return err
	}
	if question != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := a.send(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if answer == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxReply)).Decode(answer); err != nil {
		return fmt.Errorf("%s gives an answer that cannot be read; is it a server of backing images? %w", a.base, err)
	}
	return nil
}

// imageRef is an image, and perhaps one of its versions.
type imageRef struct {
	name, reference string
}

func parseImageRef(text string) (imageRef, error) {
	r := imageRef{name: text}
	if name, sum, ok := strings.Cut(text, "@"); ok {
		r = imageRef{name, sum}
	} else if name, version, ok := strings.Cut(text, ":"); ok {
		r = imageRef{name, version}
	}
	if r.name == "" || strings.ContainsAny(r.name, "/?#%") || r.name != text && r.reference == "" {
		return r, fmt.Errorf("%q is no image: write debian, debian:v3, debian:stable or debian@sha512:…", text)
	}
	return r, nil
}

func (r imageRef) path() string { return "/v1/backing-images/" + url.PathEscape(r.name) }

// version finds the one version that is meant.
func (a *imageAPI) version(ctx context.Context, r imageRef) (backing.Version, error) {
	reference := r.reference
	if reference == "" {
		var image backing.Image
		if err := a.ask(ctx, http.MethodGet, r.path(), nil, &image); err != nil {
			return backing.Version{}, err
		}
		if tag, ok := image.Tags["latest"]; ok {
			reference = tag.Version
		} else {
			for _, v := range image.Versions {
				if v.State == backing.Ready {
					reference = v.Version
					break
				}
			}
		}
		if reference == "" {
			return backing.Version{}, fmt.Errorf("%s has no version that is ready", r.name)
		}
	}
	var v backing.Version
	err := a.ask(ctx, http.MethodGet, r.path()+"/versions/"+url.PathEscape(reference), nil, &v)
	return v, err
}

// untilInterrupted is the context of a command that a person may interrupt.
func untilInterrupted(cmd *cobra.Command) (context.Context, context.CancelFunc) {
	ctx := cmd.Context()
	if ctx == nil {
		ctx = context.Background()
	}
	return signal.NotifyContext(ctx, os.Interrupt)
}
