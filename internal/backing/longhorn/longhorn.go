// Package longhorn is a client of Longhorn's manager: of those calls of its REST API
// that backing images need (longhorn-manager, api/router.go and api/backingimage.go).
//
// The API has traps. Nearly every error is a 500 that only its message explains, and
// is sent as text/plain. Its links lead wherever the Host header or a setting says,
// so none is followed: addresses are built from the base alone. A browser's
// User-Agent gets HTML, and a slash at an address's end is redirected, which loses
// the body of a POST. Before release 1.5.1 what is absent is a 500 as well.
package longhorn

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
)

const (
	timeout    = 10 * time.Second // of every call but Upload
	stall      = 2 * time.Minute  // without a byte that Longhorn takes of an upload
	settle     = 10 * time.Minute // from an upload's last byte to its answer
	maxAnswer  = 32 << 20
	maxMessage = 1000
)

// What an error of this package is; its text says more.
var (
	ErrNotFound = errors.New("not in Longhorn")
	ErrExists   = errors.New("already in Longhorn")
	// ErrRefused is that one of Longhorn's rules forbids it.
	ErrRefused = errors.New("refused by Longhorn")
	// ErrAway is that nobody knows: Longhorn did not answer, or what did is not
	// Longhorn, or does not let us pass. Nothing follows from it about what is there.
	ErrAway = errors.New("Longhorn cannot be asked")
	// ErrFailed is any other error that Longhorn reports.
	ErrFailed = errors.New("error in Longhorn")
)

// An Error is what went wrong in a call.
type Error struct {
	Kind    error // one of those above
	Status  int   // 0: there was no answer
	Message string
	Err     error
}

func (e *Error) Error() string { return e.Message }

func (e *Error) Unwrap() []error {
	if e.Err == nil {
		return []error{e.Kind}
	}
	return []error{e.Kind, e.Err}
}

// A Client calls the manager of one cluster.
type Client struct {
	base, auth     string
	http           *http.Client
	timeout, stall time.Duration // as the constants, but in tests
}

// New returns a client of the manager at an address, which may have a path before
// /v1, as behind a proxy, and may end in /v1 or not. token is what a proxy before the
// manager expects, since Longhorn itself checks nothing: a bearer token, or whole if
// it begins with "Basic " or "Bearer ".
func New(address, token string) (*Client, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("%.100q is no address of a Longhorn manager; one looks like http://longhorn-backend.longhorn-system:9500", address)
	}
	if u.User != nil {
		return nil, errors.New("the address of a Longhorn manager has a password in it; give it as the token, as in \"Basic …\"")
	}
	path := strings.TrimRight(u.EscapedPath(), "/")
	path = strings.TrimRight(strings.TrimSuffix(path, "/v1"), "/")
	c := &Client{base: u.Scheme + "://" + u.Host + path + "/v1", auth: token, timeout: timeout, stall: stall}
	if token != "" && !strings.HasPrefix(token, "Basic ") && !strings.HasPrefix(token, "Bearer ") {
		c.auth = "Bearer " + token
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = 2
	transport.MaxResponseHeaderBytes = 64 << 10
	c.http = &http.Client{
		Transport: transport,
		// A redirect would lose the body, or lead where the token does not belong.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c, nil
}

// Close lets go of idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Image is a backing image. What a release does not tell is nil or empty.
type Image struct {
	Name              string              `json:"name"`
	UUID              string              `json:"uuid"`
	SourceType        string              `json:"sourceType"`
	Parameters        map[string]string   `json:"parameters"`
	ExpectedChecksum  string              `json:"expectedChecksum"`
	CurrentChecksum   string              `json:"currentChecksum"` // of SHA-512; empty until the file is complete
	Size              int64               `json:"size"`
	MinNumberOfCopies *int                `json:"minNumberOfCopies"` // since 1.7
	DeletionTimestamp string              `json:"deletionTimestamp"`
	Files             map[string]DiskFile `json:"diskFileStatusMap"` // by the disk's UUID
}

// DiskFile is the copy on one disk.
type DiskFile struct {
	State    string `json:"state"`
	Progress int    `json:"progress"` // percent
	Message  string `json:"message"`
}

// States of a DiskFile, besides "" of one that is not begun
// (longhorn-manager, k8s/pkg/apis/longhorn/v1beta2/backingimage.go).
const (
	Pending          = "pending" // waits for an upload
	Starting         = "starting"
	InProgress       = "in-progress"
	ReadyForTransfer = "ready-for-transfer"
	Ready            = "ready"
	Failed           = "failed"
	FailedCleanup    = "failed-and-cleanup"
	Unknown          = "unknown" // its node is lost, or the file is being hashed again
)

// Input is a backing image to be made. Releases ignore what they do not know.
type Input struct {
	Name              string            `json:"name"`
	SourceType        string            `json:"sourceType"` // download or upload
	Parameters        map[string]string `json:"parameters"`
	ExpectedChecksum  string            `json:"expectedChecksum"`
	MinNumberOfCopies int               `json:"minNumberOfCopies,omitempty"`
	NodeSelector      []string          `json:"nodeSelector,omitempty"`
	DiskSelector      []string          `json:"diskSelector,omitempty"`
	DataEngine        string            `json:"dataEngine,omitempty"`
}

// Volume is a volume of the cluster.
type Volume struct {
	Name         string `json:"name"`
	BackingImage string `json:"backingImage"`
	State        string `json:"state"`
}

// BackupVolume is what there are backups of.
type BackupVolume struct {
	Name                 string `json:"name"`
	BackingImageName     string `json:"backingImageName"`
	BackingImageChecksum string `json:"backingImageChecksum"`
}

// Node is a node with its disks, by their names.
type Node struct {
	Name  string `json:"name"`
	Disks map[string]struct {
		UUID string `json:"diskUUID"`
	} `json:"disks"`
}

// Reach finds out whether the manager can be asked.
func (c *Client) Reach(ctx context.Context) error {
	var version struct {
		Type string `json:"type"`
	}
	return c.call(ctx, http.MethodGet, "", nil, &version)
}

// Images lists all backing images.
func (c *Client) Images(ctx context.Context) ([]Image, error) {
	return list[Image](ctx, c, "/backingimages")
}

// Volumes lists all volumes.
func (c *Client) Volumes(ctx context.Context) ([]Volume, error) {
	return list[Volume](ctx, c, "/volumes")
}

// BackupVolumes lists what there are backups of.
func (c *Client) BackupVolumes(ctx context.Context) ([]BackupVolume, error) {
	return list[BackupVolume](ctx, c, "/backupvolumes")
}

// Nodes lists the nodes.
func (c *Client) Nodes(ctx context.Context) ([]Node, error) {
	return list[Node](ctx, c, "/nodes")
}

func list[T any](ctx context.Context, c *Client, path string) ([]T, error) {
	var answer struct {
		Type string `json:"type"`
		Data *[]T   `json:"data"`
	}
	if err := c.call(ctx, http.MethodGet, path, nil, &answer); err != nil {
		return nil, err
	}
	// An object that is no list would read as an empty one, from which it would
	// follow that all is gone.
	if answer.Data == nil || answer.Type != "collection" {
		return nil, c.away(http.StatusOK, "it sent something else than a list", nil)
	}
	return *answer.Data, nil
}

// Image returns a backing image.
func (c *Client) Image(ctx context.Context, name string) (Image, error) {
	var answer Image
	err := c.call(ctx, http.MethodGet, "/backingimages/"+url.PathEscape(name), nil, &answer)
	if err == nil && answer.Name == "" {
		return Image{}, c.away(http.StatusOK, "it sent something else than a backing image", nil)
	}
	return answer, err
}

// Create makes a backing image and returns it, under the name that Longhorn gave it.
func (c *Client) Create(ctx context.Context, in Input) (Image, error) {
	if in.Parameters == nil {
		in.Parameters = map[string]string{}
	}
	var answer Image
	err := c.call(ctx, http.MethodPost, "/backingimages", in, &answer)
	if err == nil && answer.Name == "" {
		return Image{}, c.away(http.StatusOK, "it sent something else than a backing image", nil)
	}
	return answer, err
}

// Delete begins to delete a backing image, which is there until Image says that it is
// not. Longhorn refuses it while replicas use it.
func (c *Client) Delete(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, "/backingimages/"+url.PathEscape(name), nil, nil)
}

// Upload sends the bytes of a backing image with the source upload, once a file of it
// is Pending (longhorn-ui, src/models/backingImage.js). It takes as long as it takes;
// it fails if Longhorn takes nothing for two minutes. Longhorn can resume none.
func (c *Client) Upload(ctx context.Context, name string, size int64, file io.Reader) error {
	var around bytes.Buffer
	form := multipart.NewWriter(&around)
	if _, err := form.CreateFormFile("chunk", "blob"); err != nil {
		return err
	}
	before := around.Len()
	if err := form.Close(); err != nil {
		return err
	}

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(c.stall, func() {
		cancel(errors.New("it takes no more bytes of the upload"))
	})
	defer timer.Stop()
	body := &sending{Reader: io.LimitReader(file, size), left: size, timer: timer, stall: c.stall}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost,
		c.base+"/backingimages/"+url.PathEscape(name)+"?action=upload&size="+strconv.FormatInt(size, 10),
		io.MultiReader(bytes.NewReader(around.Bytes()[:before]), body, bytes.NewReader(around.Bytes()[before:])))
	if err != nil {
		return err
	}
	request.ContentLength = int64(around.Len()) + size
	request.Header.Set("Content-Type", form.FormDataContentType())
	return c.do(request, nil)
}

// sending is a file on its way, which proves with every read that Longhorn takes it.
type sending struct {
	io.Reader
	left  int64
	timer *time.Timer
	stall time.Duration
}

func (s *sending) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	s.left -= int64(n)
	if s.left > 0 {
		s.timer.Reset(s.stall)
	} else {
		s.timer.Reset(settle)
	}
	return n, err
}

func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(data)
	}
	request, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return err
	}
	if in != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	return c.do(request, out)
}

func (c *Client) do(request *http.Request, out any) error {
	request.Header.Set("Accept", "application/json")
	request.Header.Set("User-Agent", "caddy-registry-mirror")
	if c.auth != "" {
		request.Header.Set("Authorization", c.auth)
	}
	response, err := c.http.Do(request)
	if err != nil {
		if cause := context.Cause(request.Context()); cause != nil {
			err = cause
		}
		return c.away(0, err.Error(), err)
	}
	defer response.Body.Close()
	data, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer+1))
	if err != nil {
		return c.away(response.StatusCode, "its answer was cut: "+err.Error(), err)
	}
	if len(data) > maxAnswer {
		return c.away(response.StatusCode, "its answer is larger than 32 MiB", nil)
	}
	if response.StatusCode != http.StatusOK {
		return c.judge(response.StatusCode, data)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(data, out); err != nil {
		return c.away(response.StatusCode, "what answered is not Longhorn: it sent "+kindOf(response, data), err)
	}
	return nil
}

// judge makes an error of an answer that is not 200. Only what Longhorn says is
// believed, not what a proxy does: its 404 says nothing of a backing image.
func (c *Client) judge(status int, data []byte) error {
	var answer struct {
		Type    string `json:"type"`
		Message string `json:"message"`
	}
	switch {
	case status == http.StatusUnauthorized || status == http.StatusForbidden:
		return c.away(status, "a proxy before it refuses us; set the token that it expects", nil)
	case json.Unmarshal(data, &answer) != nil || answer.Type != "error":
		// The proxied upload fails with plain text; it may have a reason in it.
		return c.away(status, fmt.Sprintf("it answers %d %s: %s", status, http.StatusText(status), plain(data)), nil)
	}
	message := shorten(answer.Message)
	e := &Error{Kind: ErrFailed, Status: status, Message: "Longhorn says: " + message}
	// The API server's wording: admission webhook "…" denied the request: <reason>.
	if _, reason, denied := strings.Cut(message, "denied the request: "); denied {
		e.Kind, e.Message = ErrRefused, "Longhorn refuses: "+reason
	} else if strings.Contains(message, "already exists") {
		e.Kind = ErrExists
	} else if status == http.StatusNotFound || strings.Contains(message, "backingimages.longhorn.io") && strings.Contains(message, "not found") {
		// Old releases answer 500; something else that is not found, such as a node,
		// says nothing of the image.
		e.Kind = ErrNotFound
	}
	return e
}

func (c *Client) away(status int, why string, err error) error {
	return &Error{Kind: ErrAway, Status: status, Message: fmt.Sprintf("Longhorn at %s cannot be asked: %s", c.base, why), Err: err}
}

func kindOf(response *http.Response, data []byte) string {
	if kind := response.Header.Get("Content-Type"); kind != "" {
		return shorten(kind)
	}
	return http.DetectContentType(data)
}

// plain is a body that is not JSON, if a person can read it.
func plain(data []byte) string {
	if strings.HasPrefix(http.DetectContentType(data), "text/plain") {
		return shorten(strings.TrimSpace(string(data)))
	}
	return "a page that is not Longhorn's"
}

// pathToken is what opens an address that Longhorn was given. Longhorn repeats the
// address where it fails to make an image, and errors end in logs.
var pathToken = regexp.MustCompile(`(/v1/files/t/)[^/\s]+`)

// Redact takes the tokens out of the addresses in what Longhorn says.
func Redact(s string) string {
	return pathToken.ReplaceAllString(strings.ToValidUTF8(s, "?"), "$1…")
}

func shorten(s string) string {
	s = Redact(s)
	if len(s) > maxMessage {
		return strings.ToValidUTF8(s[:maxMessage], "") + "…"
	}
	return s
}
