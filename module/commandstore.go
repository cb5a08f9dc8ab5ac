package module

import (
	"cmp"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/caddy-registry/mirror/internal/mirror"
)

// storeCmds are the commands that look at a store, and pins.
func storeCmds() []*cobra.Command {
	du := &cobra.Command{
		Use:   "du",
		Short: "Shows what takes how much",
		Long: `
Shows how much of the store belongs to each registry, and the largest
repositories. What several of them share is counted for each, and once in the
last line.
`,
		Args: cobra.NoArgs,
		RunE: duCommand,
	}
	du.Flags().IntP("number", "n", 20, "How many of the largest repositories to show, up to 1000")
	return []*cobra.Command{
		{
			Use:   "status",
			Short: "Shows how the store is kept",
			Args:  cobra.NoArgs,
			RunE:  statusCommand,
		},
		{
			Use:     "ls [<text>]",
			Short:   "Lists the repositories of the store",
			Long:    "\nLists the repositories of the store whose name contains a text, or all of them.\n",
			Example: "  caddy registry ls nginx",
			Args:    cobra.MaximumNArgs(1),
			RunE:    lsCommand,
		},
		{
			Use:     "tags <repository>",
			Short:   "Lists the tags of a repository",
			Long:    "\nLists the tags of a repository that are held. It is named as ls shows it, or as\nafter docker pull.\n",
			Example: "  caddy registry tags alpine",
			Args:    cobra.ExactArgs(1),
			RunE:    tagsCommand,
		},
		du,
		{
			Use:     "why <reference>",
			Short:   "Says how a pull would be answered, and why",
			Example: "  caddy registry why alpine:3.20",
			Args:    cobra.ExactArgs(1),
			RunE:    whyCommand,
		},
		{
			Use:   "pin [<reference>...]",
			Short: "Keeps images from being evicted, or lists those that are kept",
			Long: `
Keeps tags, or manifests named by their digests, from being evicted, by a budget,
a ttl or a purge. They need not be held yet. Without a reference it lists what is
pinned.
`,
			Example: "  caddy registry pin alpine:3.20 ghcr.io/org/app:v1",
			RunE:    pinCommand,
		},
		{
			Use:     "unpin <reference>...",
			Short:   "Lets images be evicted again",
			Example: "  caddy registry unpin alpine:3.20",
			Args:    cobra.MinimumNArgs(1),
			RunE:    unpinCommand,
		},
	}
}

// get asks the admin API that a command is for.
func get(cmd *cobra.Command, path string, answer any) error {
	admin, err := adminAPI(cmd)
	if err != nil {
		return err
	}
	return admin.ask(http.MethodGet, path, nil, answer)
}

// table prints lines of cells that are divided by tabs.
func table(w io.Writer, lines func(line func(cells ...string))) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	lines(func(cells ...string) { fmt.Fprintln(t, strings.Join(cells, "\t")) })
	return t.Flush()
}

func size(bytes int64) string {
	if bytes < 0 {
		return "-" + humanize.IBytes(uint64(-bytes))
	}
	return humanize.IBytes(uint64(bytes))
}

func number(n int64) string { return humanize.Comma(n) }

// ago is when something was, or never.
func ago(then, now time.Time) string {
	if then.IsZero() {
		return "never"
	}
	return humanize.RelTime(then, now, "ago", "from now")
}

// some is a number of things: 1 blob, 2 blobs.
func some(n int64, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	if strings.HasSuffix(thing, "y") {
		return number(n) + " " + strings.TrimSuffix(thing, "y") + "ies"
	}
	return number(n) + " " + thing + "s"
}

func statusCommand(cmd *cobra.Command, _ []string) error {
	var status storeStatus
	if err := get(cmd, "status", &status); err != nil {
		return err
	}
	if done, err := printJSON(cmd, status); done || err != nil {
		return err
	}
	return status.print(cmd.OutOrStdout(), time.Now())
}

func (s storeStatus) print(w io.Writer, now time.Time) error {
	err := table(w, func(line func(...string)) {
		line("store", s.Store)
		held := size(s.Usage.Allocated) + " on disk"
		if s.Distant != nil {
			held = size(s.Usage.Allocated) + " in the bucket"
		}
		if s.MaxSize > 0 {
			held += fmt.Sprintf(", %.0f %% of %s", 100*float64(s.Usage.Allocated+s.Partial+s.Reserved)/float64(s.MaxSize), size(s.MaxSize))
		}
		line("content", held)
		line("", strings.Join([]string{some(s.Usage.Repositories, "repository"), some(s.Usage.Tags, "tag"), some(s.Usage.Manifests, "manifest"), some(s.Usage.Blobs, "blob")}, ", "))
		line("on its way", fmt.Sprintf("%s reserved, %s of unfinished blobs", size(s.Reserved), size(s.Partial)))
		s.Distant.lines(line, now)
		if s.Off != "" {
			line("off", s.Off)
		}
		state := s.Catalog
		if s.Complete.IsZero() {
			state += "; figures are partial, and nothing is evicted"
		}
		line("catalog", state)
		line("evicted", fmt.Sprintf("%s, %s, %s since the start", some(s.Evicted.Roots, "image"), some(s.Evicted.Blobs, "blob"), size(s.Evicted.Bytes)))
		gc := "never since the start"
		if s.LastGC != nil {
			gc = fmt.Sprintf("%s, %s", ago(cmp.Or(s.LastGC.Ended, s.LastGC.Begun), now), outcome(*s.LastGC))
		}
		line("gc", gc)
		scrub := "not all read yet"
		if !s.LastScrub.IsZero() {
			scrub = "all read " + ago(s.LastScrub, now)
		}
		line("scrub", scrub)
		damage := "none known"
		if n := len(s.Damaged); n > 0 {
			damage = some(int64(n), "blob") + " that cannot be fetched again:"
		}
		line("damage", damage)
		for _, d := range s.Damaged {
			line("", fmt.Sprintf("%s in %s", d.Digest, strings.Join(d.Repositories, ", ")))
		}
	})
	if err == nil && len(s.Upstreams) > 0 {
		fmt.Fprintln(w)
		err = table(w, func(line func(...string)) {
			line("UPSTREAM", "SIZE", "MAX SIZE", "TTL")
			for _, u := range s.Upstreams {
				line(u.Name, size(u.Bytes), limit(u.MaxSize), ttl(u.TTL))
			}
		})
	}
	if err == nil && len(s.Hosted) > 0 {
		fmt.Fprintln(w)
		err = table(w, func(line func(...string)) {
			line("HOSTED", "SIZE", "MAX SIZE")
			for _, h := range s.Hosted {
				line(h.Pattern, size(h.Bytes), limit(h.MaxSize))
			}
		})
	}
	if b := s.Backing; err == nil && b != nil {
		fmt.Fprintln(w)
		err = b.print(w)
	}
	if err == nil && len(s.Webhooks) > 0 {
		fmt.Fprintln(w)
		err = table(w, func(line func(...string)) {
			line("WEBHOOK", "PENDING", "DELIVERED", "FAILED", "DROPPED", "TROUBLE")
			for _, hook := range s.Webhooks {
				line(hook.Name, number(int64(hook.Pending)), number(hook.Delivered), number(hook.Failed), number(hook.Dropped), cmp.Or(hook.Trouble, "none"))
			}
		})
	}
	return err
}

// lines tell how it stands with a distant place, which need not be.
func (d *distantStatus) lines(line func(...string), now time.Time) {
	if d == nil {
		return
	}
	near := size(d.Near) + " on this machine's disk"
	if d.NearSize > 0 {
		near = fmt.Sprintf("%s of %s on this machine's disk", size(d.Near), size(d.NearSize))
	}
	line("near", near)
	waiting := "none wait"
	if d.Pending > 0 {
		waiting = fmt.Sprintf("%s, %s; the oldest has waited since %s", some(d.Pending, "value"), size(d.PendingBytes), ago(d.Oldest, now))
	}
	line("uploads", waiting)
	place := "answers"
	switch {
	case !d.Unavailable.IsZero():
		place = "cannot be reached since " + ago(d.Unavailable, now) + ": " + d.Trouble
	case !d.Listed:
		place = "is being listed"
	}
	line("bucket", place)
	if len(d.Others) > 0 {
		line("shared with", strings.Join(d.Others, ", "))
	}
}

func limit(bytes int64) string {
	if bytes == 0 {
		return "off"
	}
	return size(bytes)
}

// ttl is how long something is kept.
func ttl(n float64) string {
	if n == 0 {
		return "off"
	}
	return seconds(n)
}

// seconds is so many of them, in days where that is even.
func seconds(n float64) string {
	d := time.Duration(n * float64(time.Second))
	switch {
	case d == 0:
		return "0s"
	case d%(24*time.Hour) == 0:
		return strconv.Itoa(int(d/(24*time.Hour))) + "d"
	}
	return d.String()
}

// partialNote follows a list that may lack something.
const partialNote = "The catalog is being made again: there may be more."

// note prints a sentence where it does not get in the way of a list.
func note(cmd *cobra.Command, say bool, sentence string) {
	if say {
		fmt.Fprintln(cmd.ErrOrStderr(), sentence)
	}
}

func lsCommand(cmd *cobra.Command, args []string) error {
	query := url.Values{"n": {strconv.Itoa(maxPage)}}
	if len(args) > 0 {
		query.Set("containing", args[0])
	}
	all := repositoryPage{Repositories: []repositoryLine{}}
	for {
		var part repositoryPage
		if err := get(cmd, "repositories?"+query.Encode(), &part); err != nil {
			return err
		}
		all.Repositories, all.Partial = append(all.Repositories, part.Repositories...), part.Partial
		if part.Next == "" {
			break
		}
		query.Set("after", part.Next)
	}
	if done, err := printJSON(cmd, all); done || err != nil {
		return err
	}
	note(cmd, all.Partial, partialNote)
	return printRepositories(cmd.OutOrStdout(), all.Repositories)
}

func printRepositories(w io.Writer, list []repositoryLine) error {
	return table(w, func(line func(...string)) {
		line("REPOSITORY", "CLASS", "TAGS", "MANIFESTS", "BLOBS", "SIZE", "ON DISK")
		for _, r := range list {
			line(r.Name, string(r.Class), number(r.Usage.Tags), number(r.Usage.Manifests), number(r.Usage.Blobs), size(r.Usage.Bytes), size(r.Usage.Allocated))
		}
	})
}

func tagsCommand(cmd *cobra.Command, args []string) error {
	query := url.Values{"n": {strconv.Itoa(maxPage)}, "repository": {args[0]}}
	all := tagPage{Tags: []tagLine{}}
	for {
		var part tagPage
		if err := get(cmd, "tags?"+query.Encode(), &part); err != nil {
			return err
		}
		all.Repository, all.Tags, all.Partial = part.Repository, append(all.Tags, part.Tags...), part.Partial
		if part.Next == "" {
			break
		}
		query.Set("after", part.Next)
	}
	if done, err := printJSON(cmd, all); done || err != nil {
		return err
	}
	note(cmd, all.Partial, partialNote)
	return all.print(cmd.OutOrStdout(), time.Now())
}

func (p tagPage) print(w io.Writer, now time.Time) error {
	return table(w, func(line func(...string)) {
		line("TAG", "DIGEST", "SIZE", "SINCE", "LAST PULL", "PINNED")
		for _, t := range p.Tags {
			pinned := ""
			if t.Pinned {
				pinned = "pinned"
			}
			line(t.Name, short(string(t.Digest)), size(t.Bytes), ago(t.Since, now), ago(t.Read, now), pinned)
		}
	})
}

// short is enough of a digest to tell it from others.
func short(d string) string {
	if algorithm, hex, ok := strings.Cut(d, ":"); ok && len(hex) > 12 {
		return algorithm + ":" + hex[:12]
	}
	return d
}

func duCommand(cmd *cobra.Command, _ []string) error {
	n, err := cmd.Flags().GetInt("number")
	if err != nil {
		return err
	}
	var used usageReport
	if err := get(cmd, "usage?n="+strconv.Itoa(n), &used); err != nil {
		return err
	}
	if done, err := printJSON(cmd, used); done || err != nil {
		return err
	}
	note(cmd, used.Partial, "The catalog is being made again: these figures are partial.")
	return used.print(cmd.OutOrStdout())
}

func (u usageReport) print(w io.Writer) error {
	if err := table(w, func(line func(...string)) {
		line("UPSTREAM", "REPOSITORIES", "TAGS", "BLOBS", "SIZE", "ON DISK", "MAX SIZE")
		row := func(name string, u usage, max string) {
			line(name, number(u.Repositories), number(u.Tags), number(u.Blobs), size(u.Bytes), size(u.Allocated), max)
		}
		for _, up := range u.Upstreams {
			row(cmp.Or(up.Name, "(hosted)"), up.Usage, limit(up.MaxSize))
		}
		row("the store", u.Store, limit(u.MaxSize))
		if u.Near != nil {
			line("on this machine", "", "", "", "", size(u.Near.Bytes), limit(u.Near.MaxSize))
		}
	}); err != nil || len(u.Repositories) == 0 {
		return err
	}
	fmt.Fprintln(w)
	return printRepositories(w, u.Repositories)
}

func pinCommand(cmd *cobra.Command, references []string) error {
	if len(references) > 0 {
		return eachReference(cmd, references, "pinned", func(admin api, reference string) (pinLine, error) {
			var line pinLine
			err := admin.ask(http.MethodPost, "pins", map[string]string{"reference": reference}, &line)
			return line, err
		})
	}
	query := url.Values{"n": {strconv.Itoa(maxPage)}}
	all := pinPage{Pins: []pinLine{}}
	for {
		var part pinPage
		if err := get(cmd, "pins?"+query.Encode(), &part); err != nil {
			return err
		}
		all.Pins = append(all.Pins, part.Pins...)
		if part.Next == "" {
			break
		}
		query.Set("after", part.Next)
	}
	if done, err := printJSON(cmd, all); done || err != nil {
		return err
	}
	now := time.Now()
	return table(cmd.OutOrStdout(), func(line func(...string)) {
		line("PINNED", "SINCE")
		for _, p := range all.Pins {
			line(p.name(), ago(p.Since, now))
		}
	})
}

func unpinCommand(cmd *cobra.Command, references []string) error {
	return eachReference(cmd, references, "unpinned", func(admin api, reference string) (pinLine, error) {
		var line pinLine
		err := admin.ask(http.MethodDelete, "pins?"+url.Values{"reference": {reference}}.Encode(), nil, &line)
		return line, err
	})
}

// eachReference does something to each, and tells of what fails in the end.
func eachReference(cmd *cobra.Command, references []string, done string, do func(admin api, reference string) (pinLine, error)) error {
	admin, err := adminAPI(cmd)
	if err != nil {
		return err
	}
	failed := 0
	for _, reference := range references {
		line, err := do(admin, reference)
		if err != nil {
			fmt.Fprintf(cmd.ErrOrStderr(), "%s: %v\n", reference, err)
			failed++
			continue
		}
		switch shown, err := printJSON(cmd, line); {
		case err != nil:
			return err
		case !shown:
			fmt.Fprintln(cmd.OutOrStdout(), line.name(), done)
		}
	}
	if failed > 0 {
		cmd.SilenceErrors = true // each has been told of
		return fmt.Errorf("%d of %d references could not be %s", failed, len(references), done)
	}
	return nil
}

func whyCommand(cmd *cobra.Command, args []string) error {
	var why explanation
	if err := get(cmd, "why?"+url.Values{"reference": {args[0]}}.Encode(), &why); err != nil {
		return err
	}
	if done, err := printJSON(cmd, why); done || err != nil {
		return err
	}
	return why.print(cmd.OutOrStdout(), time.Now())
}

func (e explanation) print(w io.Writer, now time.Time) error {
	return table(w, func(line func(...string)) {
		given := func(name, value string) {
			if value != "" {
				line(name, value)
			}
		}
		line("reference", e.Reference)
		line("answer", e.Answer)
		given("upstream", e.Upstream)
		for i, endpoint := range e.Endpoints {
			name := ""
			if i == 0 {
				name = "asked at"
			}
			line(name, endpoint)
		}
		line("stored in", e.Repository)
		line("", e.Record)
		given("readers", e.Readers)
		given("means", string(e.Digest))
		if t := e.Tag; t != nil {
			line("tag", t.Standing)
			if !t.Gone.IsZero() {
				line("", "found gone "+ago(t.Gone, now))
			}
			if t.Checked.IsZero() {
				line("", "not checked since the start; tag_ttl is "+seconds(t.TTL))
			} else {
				line("", "checked "+ago(t.Checked, now)+"; tag_ttl is "+seconds(t.TTL))
			}
			if !t.Moved.IsZero() {
				line("", fmt.Sprintf("moved %s from %s", ago(t.Moved, now), t.Previous))
			}
			given("last check", t.Failure)
		}
		given("pinned", e.Pinned)
		if m := e.Manifest; m != nil {
			where := "in the store"
			switch {
			case m.Unstored:
				where = "in memory only"
			case m.Hot:
				where = "in the store and in memory"
			}
			line("manifest", m.MediaType+", "+where)
			for _, list := range []struct {
				name string
				of   []mirror.WhyBlob
			}{{"images", m.Children}, {"blobs", m.Blobs}} {
				for i, blob := range list.of {
					name := ""
					if i == 0 {
						name = list.name
					}
					line(name, blobLine(blob))
				}
			}
		}
		e.Held.lines(line, now)
	})
}

// blobLine says of a blob whether it is held.
func blobLine(b mirror.WhyBlob) string {
	text := short(string(b.Digest))
	if b.Platform != "" {
		text += " " + b.Platform
	}
	if b.Size >= 0 {
		text += ", " + size(b.Size)
	}
	if b.Held {
		return text + ", held"
	}
	return text + ", not held"
}

// lines tell what the catalog knows, which is nothing of what is not held.
func (h *heldReport) lines(line func(...string), now time.Time) {
	if h == nil {
		return
	}
	line("held", size(h.Bytes)+", since "+ago(h.Since, now))
	line("last pull", ago(h.Read, now))
	switch {
	case h.Pinned:
		line("eviction", "never, it is pinned")
	case !h.Evictable:
		line("eviction", "not by itself: it is hosted, or goes with a tag or an index")
	case h.Before == 0:
		line("eviction", "would be next, and free "+size(h.Frees))
	default:
		line("eviction", fmt.Sprintf("after %s that were pulled longer ago, and would free %s", some(h.Before, "image"), size(h.Frees)))
	}
}
