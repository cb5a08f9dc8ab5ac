package backing

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/caddy-registry/mirror/internal/backing/longhorn"
	"github.com/caddy-registry/mirror/internal/failpoint"
	"github.com/caddy-registry/mirror/internal/oci"
)

// pace is how often Longhorn is asked.
type pace struct {
	moving time.Duration // while something changes there
	idle   time.Duration // else, give or take a tenth; also the most after errors
	poll   time.Duration // while somebody waits for a removal
	reach  time.Duration // how long an answer is good for that tells whether Longhorn is there
	resend time.Duration // after an upload that Longhorn still waits for: what it says lags
	stuck  time.Duration // after which a complete file that goes nowhere is stuck
}

var defaultPace = pace{moving: 5 * time.Second, idle: time.Minute, poll: time.Second, reach: 10 * time.Second, resend: time.Minute, stuck: 10 * time.Minute}

// maxMessage is how many bytes are told of what Longhorn says of a disk.
const maxMessage = 1000

// maxAttempts is how often an upload to Longhorn is begun anew: it can resume none.
const maxAttempts = 3

// maxSending is how many uploads to Longhorn there are at once.
const maxSending = 4

// cluster is a Longhorn that is configured.
type cluster struct {
	Cluster
	client *longhorn.Client
	cancel context.CancelFunc
	kick   chan struct{}
	// registering has one for who changes a record of a registration here.
	registering chan struct{}
	disks       map[string]string // of the nodes that were seen; the loop's own
	reach       reach
}

// lock is had by one at a time, who changes a record of a registration.
func (c *cluster) lock(ctx context.Context) (unlock func(), err error) {
	select {
	case c.registering <- struct{}{}:
		return func() { <-c.registering }, nil
	case <-ctx.Done():
		return nil, fail(Busy, "Longhorn %s is being asked; try again: %w", c.Name, context.Cause(ctx))
	}
}

// lock is that of a cluster, if it is configured.
func (r *registrar) lock(ctx context.Context, name string) (unlock func(), err error) {
	r.mu.Lock()
	c := r.clusters[name]
	r.mu.Unlock()
	if c == nil {
		return func() {}, nil
	}
	return c.lock(ctx)
}

// wake has the cluster asked now.
func (c *cluster) wake() {
	select {
	case c.kick <- struct{}{}:
	default:
	}
}

// reconcile compares what is registered with what Longhorn has, until ctx ends.
func (r *registrar) reconcile(ctx context.Context, c *cluster) {
	defer c.client.Close()
	failures := 0
	for {
		moving, err := r.pass(ctx, c)
		if ctx.Err() != nil {
			return
		}
		wait := r.pace.idle - r.pace.idle/10 + rand.N(r.pace.idle/5+1)
		switch {
		case err != nil:
			if failures == 0 {
				r.log.Warn("Longhorn cannot be asked; its registrations stay as they are", zap.String("longhorn", c.Name), zap.Error(err))
			}
			wait = min(r.pace.moving<<min(failures, 10), r.pace.idle)
			failures++
		default:
			failures = 0
			if moving {
				wait = r.pace.moving
			}
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		case <-c.kick:
			timer.Stop()
		}
	}
}

// pass asks a cluster once, and takes each of its registrations on by a step.
func (r *registrar) pass(ctx context.Context, c *cluster) (moving bool, err error) {
	if err := r.load(ctx); err != nil {
		return false, err
	}
	r.mu.Lock()
	var places []place
	for p, held := range r.held {
		if p.cluster == c.Name {
			places = append(places, p)
			held.settled = !held.sending
		}
	}
	r.mu.Unlock()
	if len(places) == 0 {
		return false, nil
	}
	images, err := c.client.Images(ctx)
	if err != nil {
		r.away(places, err)
		return false, err
	}
	r.nameDisks(ctx, c, images)
	for _, p := range places {
		if err := r.step(ctx, c, p, images); err != nil {
			if errors.Is(err, longhorn.ErrAway) {
				r.away([]place{p}, err)
				return false, err
			}
			r.see(p, func(held *registered) { held.message = err.Error() })
			r.log.Warn("a registration does not go on", zap.String("image", p.image), zap.String("version", p.version),
				zap.String("longhorn", p.cluster), zap.Error(err))
		}
		r.mu.Lock()
		if held := r.held[p]; held != nil {
			moving = moving || slices.Contains([]RegistrationState{Pending, Downloading, Removing, Degraded}, held.state)
		}
		r.mu.Unlock()
	}
	return moving, nil
}

// away notes that nobody knows of registrations.
func (r *registrar) away(places []place, err error) {
	for _, p := range places {
		r.see(p, func(held *registered) { held.state, held.message = Unknown, err.Error() })
	}
}

// see changes what is known of a registration.
func (r *registrar) see(p place, f func(*registered)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if held := r.held[p]; held != nil {
		f(held)
		held.checked = time.Now().UTC()
	}
}

// nameDisks asks for the nodes when there is a disk of which none has been seen. Where
// they cannot be had a disk goes by its UUID.
func (r *registrar) nameDisks(ctx context.Context, c *cluster, images []longhorn.Image) {
	for _, image := range images {
		for disk := range image.Files {
			if _, known := c.disks[disk]; known {
				continue
			}
			nodes, err := c.client.Nodes(ctx)
			if err != nil {
				return
			}
			next := map[string]string{disk: disk}
			for _, image := range images {
				for disk := range image.Files {
					next[disk] = disk
				}
			}
			for _, node := range nodes {
				for name, disk := range node.Disks {
					next[disk.UUID] = node.Name + "/" + name
				}
			}
			c.disks = next
			return
		}
	}
}

// step compares a registration with its image.
func (r *registrar) step(ctx context.Context, c *cluster, p place, images []longhorn.Image) error {
	unlock, err := c.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	r.mu.Lock()
	held := r.held[p]
	if held == nil {
		r.mu.Unlock()
		return nil
	}
	record, refused := held.record, held.refused
	r.mu.Unlock()
	if record.Removing {
		_, err := r.remove(ctx, c, p)
		return err
	}
	image, there, err := r.lookup(ctx, c, record, images)
	if err != nil {
		return err
	}
	switch {
	case there && image.DeletionTimestamp != "":
		r.see(p, func(held *registered) { held.state, held.message = Missing, "it is being deleted in Longhorn" })
		if record.Ensure || !record.Made {
			r.see(p, func(held *registered) { held.state = Pending })
		}
		return nil
	case there && !record.Made:
		return r.adopt(ctx, p, record, image)
	case there:
		return r.judge(ctx, c, p, record, image)
	case record.Made && !record.Ensure:
		r.see(p, func(held *registered) {
			held.state, held.copies = Missing, nil
			held.message = "somebody has deleted it in Longhorn; register it with ensure to have it made again"
		})
		return nil
	case refused != "":
		r.see(p, func(held *registered) { held.state, held.message = RegFailed, refused })
		return nil
	}
	return r.create(ctx, c, p, record)
}

// lookup finds the image of a registration: by its name, or by its address, which
// nothing else has, where a process died before it read the name that Longhorn chose.
// A list may lag, so that its silence is checked.
func (r *registrar) lookup(ctx context.Context, c *cluster, record registration, images []longhorn.Image) (longhorn.Image, bool, error) {
	for _, image := range images {
		if image.Name == record.Name {
			return image, true, nil
		}
	}
	image, err := c.client.Image(ctx, record.Name)
	if err == nil {
		return image, true, nil
	}
	if !errors.Is(err, longhorn.ErrNotFound) {
		return longhorn.Image{}, false, err
	}
	if !record.Made && record.Mode == Download {
		for _, image := range images {
			if image.Parameters["url"] == record.URL {
				return image, true, nil
			}
		}
	}
	return longhorn.Image{}, false, nil
}

// adopt takes an image that was there before we knew of it for ours, if it has our
// bytes, or is fetching them from us.
func (r *registrar) adopt(ctx context.Context, p place, record registration, image longhorn.Image) error {
	ours := record.makes(image)
	if record.Mode == PushUpload && image.SourceType == "upload" && image.CurrentChecksum == "" && image.ExpectedChecksum == record.SHA512.Encoded() {
		ours = true // made, and its answer was lost; it waits for the bytes
	}
	sum := cmp.Or(image.CurrentChecksum, image.ExpectedChecksum)
	switch {
	case sum != "" && sum != record.SHA512.Encoded():
		r.see(p, func(held *registered) {
			held.state = Conflict
			held.message = fmt.Sprintf("Longhorn has an image %s with other bytes (SHA-512 %.16s…); delete it there or register under another name", image.Name, sum)
		})
		return nil
	case sum == "" && !ours:
		r.see(p, func(held *registered) {
			held.state, held.message = Pending, "Longhorn has an image of this name whose checksum is not known yet"
		})
		return nil
	}
	record.Made, record.Name = true, image.Name
	record.Adopted = !ours
	if err := r.write(ctx, record); err != nil {
		return err
	}
	r.see(p, func(held *registered) { held.state, held.message = Pending, "" })
	return nil
}

// create has Longhorn make an image.
func (r *registrar) create(ctx context.Context, c *cluster, p place, record registration) error {
	in := longhorn.Input{Name: record.Name, SourceType: string(record.Mode), ExpectedChecksum: record.SHA512.Encoded(),
		MinNumberOfCopies: record.MinNumberOfCopies, NodeSelector: record.NodeSelector, DiskSelector: record.DiskSelector, DataEngine: "v1"}
	if record.Mode == Download {
		in.Parameters = map[string]string{"url": record.URL}
	}
	if err := r.still(ctx, p); err != nil {
		return err
	}
	image, err := c.client.Create(ctx, in)
	switch {
	case errors.Is(err, longhorn.ErrExists):
		return nil // made since the list; the next pass adopts it
	case errors.Is(err, longhorn.ErrRefused):
		r.see(p, func(held *registered) { held.refused, held.state, held.message = err.Error(), RegFailed, err.Error() })
		return nil
	case errors.Is(err, longhorn.ErrAway):
		return err
	case err != nil:
		r.see(p, func(held *registered) { held.state = Pending })
		return err
	}
	failpoint.Hit("backing.registered")
	if image.Name != record.Name {
		r.log.Info("Longhorn has given a backing image another name", zap.String("asked", record.Name), zap.String("got", image.Name))
	}
	record.Name, record.Made, record.Adopted = image.Name, true, false
	if err := r.write(ctx, record); err != nil {
		return err
	}
	r.see(p, func(held *registered) {
		held.state, held.message, held.stalled, held.sent = Downloading, "", time.Time{}, time.Time{}
	})
	return nil
}

// judge says how an image that should be ours stands.
func (r *registrar) judge(ctx context.Context, c *cluster, p place, record registration, image longhorn.Image) error {
	if why := drift(record, image); why != "" {
		mine := record.makes(image)
		if record.Ensure && !mine {
			why += "; it is not what we had Longhorn make, and is left alone: delete it there, and ours is made again"
		}
		r.see(p, func(held *registered) { held.state, held.message = Drifted, why })
		if !record.Ensure || !mine {
			return nil
		}
		return r.again(ctx, c, p, record)
	}
	var count = map[string]int{}
	copies := map[string]string{}
	progress, message := 0, ""
	for disk, file := range image.Files {
		count[file.State]++
		copies[cmp.Or(c.disks[disk], disk)] = cmp.Or(file.State, "waiting")
		progress = max(progress, file.Progress)
		if file.Message != "" && (message == "" || file.State == longhorn.Failed) {
			message = longhorn.Redact(file.Message[:min(len(file.Message), maxMessage)])
		}
	}
	wanted := 1
	if image.MinNumberOfCopies != nil {
		wanted = max(1, *image.MinNumberOfCopies)
	}
	ready, failed, total := count[longhorn.Ready], count[longhorn.Failed]+count[longhorn.FailedCleanup], len(image.Files)
	complete := image.CurrentChecksum == record.SHA512.Encoded()
	waits := complete && count[""]+count[longhorn.ReadyForTransfer] == total

	var retry, send bool
	r.see(p, func(held *registered) {
		held.copies, held.progress, held.message = copies, progress, message
		if !waits {
			held.stalled = time.Time{}
		} else if held.stalled.IsZero() {
			held.stalled = time.Now()
		}
		switch {
		case ready >= wanted && complete && count[longhorn.Unknown] == 0:
			held.state, held.progress, held.attempts = InLonghorn, 100, 0
			held.message = ""
		case ready > 0 || count[longhorn.Unknown] > 0:
			held.state = Degraded
			held.message = strings.TrimSpace(fmt.Sprintf("%d of %d copies are ready, %d unknown. %s", ready, wanted, count[longhorn.Unknown], message))
		case failed > 0 && failed == total:
			held.state = RegFailed
			if record.Mode == PushUpload && !record.Adopted && held.settled && held.attempts < maxAttempts && len(r.uploads) < cap(r.uploads) {
				held.attempts++
				retry = true
			}
		case waits && time.Since(held.stalled) >= r.pace.stuck:
			held.state = Stuck
			held.message = "Longhorn has the whole file and does not take it: its size may be no multiple of 512, or nodes may lack an address in the storage network"
		default:
			held.state = Downloading
			if progress == 100 && !complete {
				held.message = "it has come, and Longhorn is hashing it"
			}
			if count[longhorn.Pending] > 0 && record.Mode == PushUpload && !record.Adopted && held.settled && !held.sending && time.Since(held.sent) >= r.pace.resend {
				select {
				case r.uploads <- struct{}{}:
					held.sending, send = true, true
				default:
					held.message = "it is sent when others have been"
				}
			}
		}
	})
	if retry && record.makes(image) {
		return r.again(ctx, c, p, record)
	}
	if send {
		r.working.Go(func() { r.send(ctx, c, p, record) })
	}
	return nil
}

// drift is what an image has that ours has not.
func drift(record registration, image longhorn.Image) string {
	if sum := image.CurrentChecksum; sum != "" && sum != record.SHA512.Encoded() {
		return fmt.Sprintf("its bytes in Longhorn are others (SHA-512 %.16s…)", sum)
	}
	if record.Adopted {
		return ""
	}
	if image.SourceType != string(record.Mode) {
		return "somebody has made it anew in Longhorn, by " + image.SourceType
	}
	if record.Mode == Download && image.Parameters["url"] != record.URL {
		return "Longhorn has another address for it: " + longhorn.Redact(image.Parameters["url"])
	}
	return ""
}

// again deletes an image that is no good, so that the next pass makes it anew. The
// record says first that there is none: who dies in between leaves one to be made.
func (r *registrar) again(ctx context.Context, c *cluster, p place, record registration) error {
	// What the list has shown may have been replaced since.
	if is, err := c.client.Image(ctx, record.Name); err == nil && !record.makes(is) {
		return nil
	} else if err != nil && !errors.Is(err, longhorn.ErrNotFound) {
		return err
	}
	was := record
	record.Made, record.Adopted = false, false
	if err := r.write(ctx, record); err != nil {
		return err
	}
	err := c.client.Delete(ctx, record.Name)
	if err == nil || errors.Is(err, longhorn.ErrNotFound) {
		return nil
	}
	if err := r.write(ctx, was); err != nil {
		return err
	}
	if errors.Is(err, longhorn.ErrRefused) {
		r.see(p, func(held *registered) { held.message += "; it cannot be made again: " + err.Error() })
		return nil
	}
	return err
}

// send uploads a version to Longhorn. What becomes of it is for the next pass to see.
func (r *registrar) send(ctx context.Context, c *cluster, p place, record registration) {
	defer func() { <-r.uploads }()
	err := func() error {
		v, err := r.version(ctx, record.Image, record.Version)
		if err != nil {
			return err
		}
		found, err := r.open(ctx, v)
		if err != nil {
			return err
		}
		defer found.Close()
		if err := found.Prepare(ctx, ctx, []oci.Span{{Length: v.Size}}, true); err != nil {
			return err
		}
		body, err := found.Reader(0)
		if err != nil {
			return err
		}
		return c.client.Upload(ctx, record.Name, v.Size, body)
	}()
	if err != nil && ctx.Err() == nil {
		r.log.Warn("an upload to Longhorn failed", zap.String("image", p.image), zap.String("longhorn", p.cluster), zap.Error(err))
	}
	r.see(p, func(held *registered) {
		if held.sending, held.sent = false, time.Now(); err != nil {
			held.message = err.Error()
		}
	})
	c.wake()
}
