package module

import (
	"cmp"
	"context"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"github.com/caddy-registry/mirror/internal/backing"
)

// draft is what a command says of the version that is to be.
type draft struct {
	name, version  string
	tags, register []string
	labels         []string // key=value
	sha512, sha256 string
	decompress     string
}

func readDraft(cmd *cobra.Command, name string) (draft, error) {
	d := draft{name: name}
	var err error
	for flag, into := range map[string]*string{"version": &d.version, "sha512": &d.sha512, "sha256": &d.sha256, "decompress": &d.decompress} {
		if *into, err = cmd.Flags().GetString(flag); err != nil {
			return d, err
		}
	}
	for flag, into := range map[string]*[]string{"tag": &d.tags, "label": &d.labels, "register": &d.register} {
		if *into, err = cmd.Flags().GetStringSlice(flag); err != nil {
			return d, err
		}
	}
	for _, label := range d.labels {
		if key, _, ok := strings.Cut(label, "="); !ok || key == "" {
			return d, fmt.Errorf("--label: %q is not key=value", label)
		}
	}
	return d, nil
}

// fields are the draft as the fields of a form, or the metadata of an upload.
func (d draft) fields() map[string]string {
	all := map[string]string{
		"name": d.name, "version": d.version, "tag": strings.Join(d.tags, ","), "labels": strings.Join(d.labels, ","),
		"register": strings.Join(d.register, ","), "sha512": d.sha512, "sha256": d.sha256, "decompress": d.decompress,
	}
	for key, value := range all {
		if value == "" {
			delete(all, key)
		}
	}
	return all
}

func imageAdd(cmd *cobra.Command, args []string) error {
	if strings.HasPrefix(args[1], "http://") || strings.HasPrefix(args[1], "https://") {
		return imagePull(cmd, args)
	}
	server, err := imageServer(cmd)
	if err != nil {
		return err
	}
	d, err := readDraft(cmd, args[0])
	if err != nil {
		return err
	}
	ctx, stop := untilInterrupted(cmd)
	defer stop()
	var v backing.Version
	if args[1] == "-" {
		v, err = server.stream(ctx, d, cmd.InOrStdin(), bar(cmd, -1, "uploading"))
	} else {
		var f *os.File
		if f, err = os.Open(args[1]); err != nil {
			return err
		}
		defer f.Close()
		var info os.FileInfo
		if info, err = f.Stat(); err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			return fmt.Errorf("%s is no file; `-` reads stdin", args[1])
		}
		v, err = server.upload(ctx, d, f, info.Size(), bar(cmd, info.Size(), "uploading"))
	}
	if err != nil {
		return err
	}
	return printVersion(cmd, v)
}

// bar shows how far something has come, to a person who looks on.
func bar(cmd *cobra.Command, total int64, what string) *progressbar.ProgressBar {
	to := cmd.ErrOrStderr()
	if !isTerminal(to) {
		to = io.Discard
	}
	// A spinner that turns by itself is beside Clear, which takes no lock.
	return progressbar.NewOptions64(total,
		progressbar.OptionSetWriter(to), progressbar.OptionSetDescription(what), progressbar.OptionShowBytes(true), progressbar.OptionUseIECUnits(true),
		progressbar.OptionSetWidth(20), progressbar.OptionThrottle(200*time.Millisecond), progressbar.OptionShowCount(), progressbar.OptionClearOnFinish(),
		progressbar.OptionSetSpinnerChangeInterval(0))
}

// stream sends what cannot be read again, as one form.
func (a *imageAPI) stream(ctx context.Context, d draft, from io.Reader, shown *progressbar.ProgressBar) (backing.Version, error) {
	body, into := io.Pipe()
	form := multipart.NewWriter(into)
	go func() {
		err := func() error {
			for key, value := range d.fields() {
				if err := form.WriteField(key, value); err != nil {
					return err
				}
			}
			part, err := form.CreateFormFile("file", d.name)
			if err != nil {
				return err
			}
			if _, err := io.Copy(part, io.TeeReader(from, shown)); err != nil {
				return err
			}
			return form.Close()
		}()
		into.CloseWithError(err)
	}()
	defer body.Close()
	defer shown.Clear()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.base+"/v1/backing-images", body)
	if err != nil {
		return backing.Version{}, err
	}
	req.Header.Set("Content-Type", form.FormDataContentType())
	return a.versionOf(req)
}

func (a *imageAPI) versionOf(req *http.Request) (backing.Version, error) {
	var v backing.Version
	resp, err := a.send(req)
	if err != nil {
		return v, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxReply)).Decode(&v); err != nil {
		return v, fmt.Errorf("%s gives an answer that cannot be read: %w", a.base, err)
	}
	return v, nil
}

const (
	firstPause = time.Second
	lastPause  = 30 * time.Second
	// maxTries is how often in a row an upload or a download is tried again that
	// comes no further: for some three minutes.
	maxTries = 10
)

// tries are attempts of which each may come further than the one before.
type tries struct {
	n     int
	pause time.Duration
}

// again waits before the next attempt, or returns the error if there is none. Only
// what another attempt can cure is worth one.
func (t *tries) again(ctx context.Context, moved bool, err error) error {
	if p, ok := errors.AsType[*problem](err); ok && p.Status != http.StatusTooManyRequests && p.Status < 500 && !p.misplaced() {
		return err
	}
	if moved {
		*t = tries{}
	}
	t.n++
	if t.n >= maxTries {
		return fmt.Errorf("given up after %d attempts that came no further: %w", t.n, err)
	}
	t.pause = min(max(2*t.pause, firstPause), lastPause)
	timer := time.NewTimer(t.pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("interrupted: %w", err)
	}
}

// upload sends a file by the protocol tus 1.0, which goes on where it was cut.
func (a *imageAPI) upload(ctx context.Context, d draft, f *os.File, total int64, shown *progressbar.ProgressBar) (backing.Version, error) {
	defer shown.Clear()
	fields := d.fields()
	fields["filename"] = filepath.Base(f.Name())
	var metadata []string
	for key, value := range fields {
		metadata = append(metadata, key+" "+base64.StdEncoding.EncodeToString([]byte(value)))
	}
	slices.Sort(metadata)
	location, err := a.begin(ctx, total, strings.Join(metadata, ","))
	if err != nil {
		return backing.Version{}, err
	}
	var t tries
	for offset := int64(0); ; {
		resp, err := a.patch(ctx, location, f, offset, total, shown)
		if err == nil {
			defer resp.Body.Close()
			if now, parseErr := strconv.ParseInt(resp.Header.Get("Upload-Offset"), 10, 64); parseErr == nil && now < total {
				offset = now
				continue
			}
			made := madeBy(resp)
			if made == "" {
				return backing.Version{}, fmt.Errorf("%s does not say what the upload has become; see `caddy registry image show %s`", a.base, d.name)
			}
			return a.taken(ctx, made)
		}
		if ctx.Err() != nil {
			return backing.Version{}, errors.New("interrupted; the server keeps what has come for a day")
		}
		before := offset
		if p, ok := errors.AsType[*problem](err); !ok || p.misplaced() {
			now, made, askErr := a.offset(ctx, location)
			if askErr == nil && made != "" {
				return a.taken(ctx, made) // only its answer was lost
			}
			if askErr == nil {
				offset = now
			} else if p, ok := errors.AsType[*problem](askErr); ok && p.Status < 500 {
				return backing.Version{}, fmt.Errorf("the upload was cut (%w), and the server has it no more: %w; see `caddy registry image show %s` whether it was taken", err, askErr, d.name)
			}
		}
		if err := t.again(ctx, offset > before, err); err != nil {
			return backing.Version{}, err
		}
	}
}

// taken is the version that an upload has become. Its bytes are safe: a server that is
// being started again at this moment is waited for.
func (a *imageAPI) taken(ctx context.Context, path string) (backing.Version, error) {
	var t tries
	for {
		v, err := a.at(ctx, path)
		if err == nil {
			return v, nil
		}
		if err := t.again(ctx, false, err); err != nil {
			return v, fmt.Errorf("the server has taken it as %s and cannot be asked: %w", path, err)
		}
	}
}

func (a *imageAPI) begin(ctx context.Context, total int64, metadata string) (location string, err error) {
	ctx, cancel := context.WithTimeout(ctx, headerPatience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.base+"/v1/uploads", http.NoBody)
	if err != nil {
		return "", err
	}
	req.Header.Set("Tus-Resumable", "1.0.0")
	req.Header.Set("Upload-Length", strconv.FormatInt(total, 10))
	req.Header.Set("Upload-Metadata", metadata)
	resp, err := a.send(req)
	if err != nil {
		return "", err
	}
	resp.Body.Close()
	to, err := url.Parse(resp.Header.Get("Location"))
	if err != nil || to.Path == "" {
		return "", fmt.Errorf("%s begins no upload; is it a server of backing images?", a.base)
	}
	// Behind a proxy the server may not know its own address, but the last part is the
	// upload's.
	return a.base + "/v1/uploads/" + url.PathEscape(to.Path[strings.LastIndexByte(to.Path, '/')+1:]), nil
}

func (a *imageAPI) patch(ctx context.Context, location string, f *os.File, offset, total int64, shown *progressbar.ProgressBar) (*http.Response, error) {
	_ = shown.Set64(offset)
	body := progressbar.NewReader(io.NewSectionReader(f, offset, total-offset), shown)
	req, err := http.NewRequestWithContext(ctx, http.MethodPatch, location, io.NopCloser(&body))
	if err != nil {
		return nil, err
	}
	req.ContentLength = total - offset
	if req.ContentLength == 0 {
		req.Body = http.NoBody
	}
	req.Header.Set("Tus-Resumable", "1.0.0")
	req.Header.Set("Upload-Offset", strconv.FormatInt(offset, 10))
	req.Header.Set("Content-Type", "application/offset+octet-stream")
	return a.send(req)
}

// offset asks how much of an upload has come, or where the version is that it has
// become.
func (a *imageAPI) offset(ctx context.Context, location string) (n int64, made string, err error) {
	ctx, cancel := context.WithTimeout(ctx, headerPatience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, location, nil)
	if err != nil {
		return 0, "", err
	}
	req.Header.Set("Tus-Resumable", "1.0.0")
	resp, err := a.send(req)
	if err != nil {
		return 0, "", err
	}
	resp.Body.Close()
	n, err = strconv.ParseInt(resp.Header.Get("Upload-Offset"), 10, 64)
	return n, madeBy(resp), err
}

// madeBy is the path of the version that an upload has become, or empty.
func madeBy(resp *http.Response) string {
	to, err := resp.Request.URL.Parse(resp.Header.Get("Backing-Image-Location"))
	if err != nil {
		return ""
	}
	// Behind a proxy there may be a path before it.
	if i := strings.Index(to.EscapedPath(), "/v1/backing-images/"); i >= 0 {
		return to.EscapedPath()[i:]
	}
	return ""
}

// at is the version at a path.
func (a *imageAPI) at(ctx context.Context, path string) (backing.Version, error) {
	var v backing.Version
	err := a.ask(ctx, http.MethodGet, path, nil, &v)
	return v, err
}

// pullRequest asks for a pull.
type pullRequest struct {
	Name     string            `json:"name"`
	Version  string            `json:"version,omitempty"`
	Tags     []string          `json:"tags,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
	Register []string          `json:"register,omitempty"`
	Source   pullSource        `json:"source"`
}

type pullSource struct {
	Type       string `json:"type"`
	URL        string `json:"url"`
	Checksum   string `json:"checksum,omitempty"` // sha512:… or sha256:…
	Decompress string `json:"decompress,omitempty"`
}

func imagePull(cmd *cobra.Command, args []string) error {
	server, err := imageServer(cmd)
	if err != nil {
		return err
	}
	d, err := readDraft(cmd, args[0])
	if err != nil {
		return err
	}
	detach, err := cmd.Flags().GetBool("detach")
	if err != nil {
		return err
	}
	asked := pullRequest{Name: d.name, Version: d.version, Tags: d.tags, Register: d.register, Source: pullSource{Type: "url", URL: args[1], Decompress: d.decompress}}
	switch {
	case d.sha512 != "" && d.sha256 != "":
		return errors.New("give one of --sha512 and --sha256")
	case d.sha512 != "":
		asked.Source.Checksum = "sha512:" + strings.TrimPrefix(d.sha512, "sha512:")
	case d.sha256 != "":
		asked.Source.Checksum = "sha256:" + strings.TrimPrefix(d.sha256, "sha256:")
	}
	for _, label := range d.labels {
		if asked.Labels == nil {
			asked.Labels = map[string]string{}
		}
		key, value, _ := strings.Cut(label, "=")
		asked.Labels[key] = value
	}
	ctx, stop := untilInterrupted(cmd)
	defer stop()
	var begun backing.Job
	if err := server.ask(ctx, http.MethodPost, "/v1/backing-images", asked, &begun); err != nil {
		return err
	}
	if detach {
		if done, err := printJSON(cmd, begun); done || err != nil {
			return err
		}
		fmt.Fprintln(cmd.OutOrStdout(), begun.ID)
		return nil
	}
	job, err := server.followJob(ctx, begun.ID, bar(cmd, -1, "pulling"), cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	if job.State != backing.Succeeded {
		return errors.New(cmp.Or(job.Error, "the pull was "+string(job.State)))
	}
	v, err := server.version(ctx, imageRef{job.Name, job.Version})
	if err != nil {
		return err
	}
	return printVersion(cmd, v)
}

// followJob follows a job to its end, and tells why it is tried again.
func (a *imageAPI) followJob(ctx context.Context, id string, shown *progressbar.ProgressBar, to io.Writer) (backing.Job, error) {
	defer shown.Clear()
	told := ""
	tick := time.NewTicker(askProgress)
	defer tick.Stop()
	for missed := 0; ; {
		var job backing.Job
		switch err := a.ask(ctx, http.MethodGet, "/v1/jobs/"+url.PathEscape(id), nil, &job); {
		case err == nil && job.State != backing.Running:
			return job, nil
		case err == nil:
			missed = 0
			if job.Error != "" && job.Error != told {
				told = job.Error
				_ = shown.Clear()
				fmt.Fprintf(to, "%s; it is tried again\n", told)
			}
			if job.Progress.Total > 0 && shown.GetMax64() != job.Progress.Total {
				shown.ChangeMax64(job.Progress.Total)
			}
			shown.Describe(string(cmp.Or(job.Step, backing.Fetching)))
			_ = shown.Set64(job.Progress.Received)
		case missed+1 < maxMissed && ctx.Err() == nil:
			missed++ // it is being restarted, perhaps
		case ctx.Err() == nil:
			return job, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return backing.Job{}, fmt.Errorf("the pull goes on without you: GET %s/v1/jobs/%s tells how far it is, and DELETE ends it", a.base, id)
		}
	}
}

func imageGet(cmd *cobra.Command, args []string) error {
	server, err := imageServer(cmd)
	if err != nil {
		return err
	}
	ref, err := parseImageRef(args[0])
	if err != nil {
		return err
	}
	ctx, stop := untilInterrupted(cmd)
	defer stop()
	v, err := server.version(ctx, ref)
	if err != nil {
		return err
	}
	if v.State != backing.Ready {
		return fmt.Errorf("%s:%s is not ready: it is %s", v.Name, v.Version, v.State)
	}
	path := ""
	if len(args) > 1 {
		path = args[1]
	}
	if path == "-" {
		return errors.New("a download goes into a file, which a later one can go on with; `curl <server>/v1/backing-images/<name>/download` writes to stdout")
	}
	path, err = server.download(ctx, v, path, bar(cmd, v.Size, "downloading"))
	if err != nil {
		return err
	}
	fmt.Fprintln(cmd.OutOrStdout(), path)
	return nil
}

// download writes a version's bytes to a file. It asks for the version and not for an
// address that a server has made up, so that it does with any name of the server.
func (a *imageAPI) download(ctx context.Context, v backing.Version, path string, shown *progressbar.ProgressBar) (string, error) {
	defer shown.Clear()
	if path == "" {
		path = v.Name + "-" + v.Version + "." + cmp.Or(string(v.Format), "img")
	}
	part, err := os.OpenFile(path+".part", os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return "", err
	}
	defer part.Close()
	hash := sha512.New()
	offset, err := io.Copy(hash, part)
	if err != nil {
		return "", err
	}
	if offset > v.Size {
		return "", fmt.Errorf("%s.part is larger than the image; remove it", path)
	}
	var t tries
	for offset < v.Size {
		_ = shown.Set64(offset)
		n, err := a.part(ctx, v, offset, io.MultiWriter(part, hash, shown))
		offset += n
		if err != nil {
			if ctx.Err() != nil {
				return "", fmt.Errorf("interrupted; the same command goes on from %s.part", path)
			}
			if err := t.again(ctx, n > 0, err); err != nil {
				return "", err
			}
		}
	}
	if sum := hex.EncodeToString(hash.Sum(nil)); sum != v.Digests.SHA512.Encoded() {
		return "", fmt.Errorf("%s.part has the sha512 %s, and not that of the image; remove it and begin again", path, sum)
	}
	if err := errors.Join(part.Sync(), os.Rename(path+".part", path)); err != nil {
		return "", err
	}
	return path, nil
}

// part copies the bytes of a version from an offset on.
func (a *imageAPI) part(ctx context.Context, v backing.Version, offset int64, into io.Writer) (int64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.base+imageRef{name: v.Name}.path()+"/download?"+url.Values{"version": {v.Version}}.Encode(), nil)
	if err != nil {
		return 0, err
	}
	want := http.StatusOK
	if offset > 0 {
		want = http.StatusPartialContent
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
	}
	req.Header.Set("Accept-Encoding", "identity")
	resp, err := a.send(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != want {
		kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
		return 0, &problem{Status: http.StatusBadRequest, Detail: fmt.Sprintf("%s answers %s with %s where an image was expected", a.base, resp.Status, kind)}
	}
	return io.Copy(into, io.LimitReader(resp.Body, v.Size-offset))
}
