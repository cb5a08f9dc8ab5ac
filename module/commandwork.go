package module

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/cobra"

	"github.com/caddy-registry/mirror/internal/retain"
)

// workCmds are the commands that begin work, or look at it.
func workCmds() []*cobra.Command {
	purge := &cobra.Command{
		Use:   "purge <pattern>",
		Short: "Removes mirrored images",
		Long: `
Removes every mirrored tag and manifest that a pattern matches, whenever it was
last pulled, and what nothing else needs of it. Names are as ls shows them. A "*"
stands for part of a component, "**" for any number of components:

	docker.io/library/alpine:3.20    one tag
	docker.io/library/alpine:3.*     tags
	docker.io/library/alpine         a repository
	docker.io/library/x@sha256:...   a manifest
	ghcr.io/org/**                   many repositories

What is pinned stays, and so does what is hosted. What is removed is fetched again
when somebody pulls it.
`,
		Example: "  caddy registry purge --dry-run 'ghcr.io/org/**'",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return workCommand(cmd, jobRequest{Kind: "purge", Pattern: args[0]})
		},
	}
	gc := &cobra.Command{
		Use:   "gc",
		Short: "Deletes what nothing refers to",
		Long: `
Compares the catalog with the store, and deletes blobs that nothing refers to and
that are older than the grace of the gc option. Pulls go on meanwhile.
`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return workCommand(cmd, jobRequest{Kind: "gc"}) },
	}
	retention := &cobra.Command{
		Use:   "retention",
		Short: "Removes tags of hosted repositories that are not to be kept",
		Long: `
Removes the tags of hosted repositories that the options keep and newer of their
pattern do not keep, and the manifests to which nothing leads without them. Pinned
and immutable tags stay. This is done before every gc that the option gc begins;
what the images took is given back by the gc.
`,
		Example: "  caddy registry retention --dry-run",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return workCommand(cmd, jobRequest{Kind: "retention"}) },
	}
	scrub := &cobra.Command{
		Use:   "scrub",
		Short: "Reads every blob again, and replaces those that are damaged",
		Long: `
Reads every blob as fast as the disk gives it, and compares it with its digest.
One that is damaged is deleted and fetched again, if it is mirrored; what is
hosted is reported.
`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return workCommand(cmd, jobRequest{Kind: "scrub"}) },
	}
	reindex := &cobra.Command{
		Use:   "reindex",
		Short: "Makes the catalog again from the store",
		Long:  "\nMakes the catalog again from the store. Pulls go on meanwhile.\n",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return workCommand(cmd, jobRequest{Kind: "reindex"}) },
	}
	for _, cmd := range []*cobra.Command{purge, gc, retention, scrub, reindex} {
		cmd.Flags().Bool("detach", false, "Print the job's id and do not wait for its end")
	}
	for _, cmd := range []*cobra.Command{purge, gc, retention} {
		cmd.Flags().Bool("dry-run", false, "Only say what would be removed")
	}
	jobs := &cobra.Command{
		Use:   "jobs [<id>]",
		Short: "Shows gc, retention, scrub, reindex and purge that run or have run",
		Long: `
Lists what runs and what has run lately, or shows one job with what it has found.
With --wait it shows the job's progress until its end.
`,
		Args: cobra.MaximumNArgs(1),
		RunE: jobsCommand,
	}
	jobs.Flags().Bool("cancel", false, "End the job early")
	jobs.Flags().Bool("wait", false, "Wait for the job's end")
	jobs.MarkFlagsMutuallyExclusive("cancel", "wait")
	return []*cobra.Command{purge, gc, retention, scrub, reindex, jobs}
}

// workCommand begins a job and follows it.
func workCommand(cmd *cobra.Command, asked jobRequest) error {
	admin, err := adminAPI(cmd)
	if err != nil {
		return err
	}
	if cmd.Flags().Lookup("dry-run") != nil {
		if asked.DryRun, err = cmd.Flags().GetBool("dry-run"); err != nil {
			return err
		}
	}
	detach, err := cmd.Flags().GetBool("detach")
	if err != nil {
		return err
	}
	var job retain.Job
	if err := admin.ask(http.MethodPost, "jobs", asked, &job); err != nil {
		return err
	}
	if detach {
		if done, err := printJSON(cmd, job); done || err != nil {
			return err
		}
		fmt.Fprintln(cmd.OutOrStdout(), job.ID)
		return nil
	}
	return follow(cmd, admin, job)
}

func jobsCommand(cmd *cobra.Command, args []string) error {
	admin, err := adminAPI(cmd)
	if err != nil {
		return err
	}
	cancel, err := cmd.Flags().GetBool("cancel")
	if err != nil {
		return err
	}
	wait, err := cmd.Flags().GetBool("wait")
	if err != nil {
		return err
	}
	if len(args) == 0 {
		if cancel || wait {
			return errors.New("say which job: `caddy registry jobs` lists them")
		}
		var list jobList
		if err := admin.ask(http.MethodGet, "jobs", nil, &list); err != nil {
			return err
		}
		if done, err := printJSON(cmd, list); done || err != nil {
			return err
		}
		return list.print(cmd.OutOrStdout(), time.Now())
	}
	method := http.MethodGet
	if cancel {
		method = http.MethodDelete
	}
	var job retain.Job
	if err := admin.ask(method, "jobs/"+url.PathEscape(args[0]), nil, &job); err != nil {
		return err
	}
	if wait {
		return follow(cmd, admin, job)
	}
	if done, err := printJSON(cmd, job); done || err != nil {
		return err
	}
	if job.Ended.IsZero() {
		fmt.Fprintln(cmd.OutOrStdout(), progress(job))
		return nil
	}
	printEnd(cmd.OutOrStdout(), job)
	return nil
}

const (
	askProgress = 500 * time.Millisecond
	sayProgress = 10 * time.Second // where nobody looks on
	maxMissed   = 6                // questions without an answer, one after the other
)

// follow shows how far a job is until it ends. A person who interrupts it leaves
// the job to itself.
func follow(cmd *cobra.Command, admin api, job retain.Job) error {
	ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt)
	defer stop()
	to := cmd.ErrOrStderr()
	live := isTerminal(to)
	tick := time.NewTicker(askProgress)
	defer tick.Stop()
	said, missed := time.Now(), 0
	for job.Ended.IsZero() {
		switch {
		case live:
			fmt.Fprint(to, "\r\x1b[K", progress(job))
		case time.Since(said) >= sayProgress:
			said = time.Now()
			fmt.Fprintln(to, progress(job))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			if live {
				fmt.Fprintln(to)
			}
			return fmt.Errorf("the %s goes on without you: `caddy registry jobs %s` shows it, and ends it with --cancel", job.Kind, job.ID)
		}
		var now retain.Job
		err := admin.ask(http.MethodGet, "jobs/"+url.PathEscape(job.ID), nil, &now)
		switch {
		case err == nil:
			job, missed = now, 0
		case missed+1 < maxMissed:
			missed++ // Caddy reloads, perhaps
		default:
			if live {
				fmt.Fprintln(to)
			}
			return err
		}
	}
	if live {
		fmt.Fprint(to, "\r\x1b[K")
	}
	switch done, err := printJSON(cmd, job); {
	case err != nil:
		return err
	case !done:
		printEnd(cmd.OutOrStdout(), job)
	}
	if job.Error != "" {
		return fmt.Errorf("%s: %s", job.Kind, job.Error)
	}
	return nil
}

// isTerminal reports whether a person looks on.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// progress is a job under way as one line.
func progress(j retain.Job) string {
	done, total := amount(j, j.Done), amount(j, j.Total)
	line := fmt.Sprintf("%s: %s of %s", j.Kind, done, total)
	if j.Total > 0 {
		line += fmt.Sprintf(" (%.0f %%)", 100*float64(min(j.Done, j.Total))/float64(j.Total))
	}
	if j.Removed > 0 {
		line += ", " + outcome(j)
	}
	return line
}

// amount is a number of what a job counts.
func amount(j retain.Job, n int64) string {
	if j.Unit == "bytes" {
		return size(n)
	}
	return number(n) + " " + j.Unit
}

// outcome is what a job has done so far.
func outcome(j retain.Job) string {
	verb, more := "removed", ""
	switch {
	case j.Kind == "scrub":
		verb = "found damaged"
		if j.Removed > 0 {
			more = fmt.Sprintf(", fetched again %s", number(j.Healed))
		}
	case j.Kind == "reindex", j.Kind == "compare":
		return "read " + amount(j, j.Done)
	case j.DryRun:
		verb = "would remove"
	}
	switch {
	case j.Kept > 0 && j.Kind == "retention":
		more = fmt.Sprintf(", %s stay since they are pinned or immutable", number(j.Kept))
	case j.Kept > 0:
		more = fmt.Sprintf(", %s stay since they are pinned", number(j.Kept))
	}
	return fmt.Sprintf("%s %s (%s)%s", verb, number(j.Removed), size(j.Bytes), more)
}

// printEnd shows a job that has ended.
func printEnd(w io.Writer, j retain.Job) {
	for _, found := range j.Found {
		fmt.Fprintln(w, found)
	}
	if more := j.Removed - int64(len(j.Found)); more > 0 && len(j.Found) > 0 {
		fmt.Fprintf(w, "and %s more\n", number(more))
	}
	fmt.Fprintf(w, "%s: %s in %s\n", j.Kind, outcome(j), j.Ended.Sub(j.Begun).Round(time.Millisecond))
	if j.Kind == "purge" && j.Removed == 0 && j.Error == "" {
		fmt.Fprintln(w, "nothing of it is held, or what is held is pinned or hosted; names are as `caddy registry ls` shows them")
	}
}

func (l jobList) print(w io.Writer, now time.Time) error {
	if l.Off != "" {
		defer fmt.Fprintln(w, "\n"+l.Off)
	}
	return table(w, func(line func(...string)) {
		line("ID", "KIND", "BEGUN", "STATE", "RESULT")
		for _, j := range l.Jobs {
			state := "running, " + amount(j, j.Done) + " of " + amount(j, j.Total)
			switch {
			case !j.Ended.IsZero() && j.Error != "":
				state = "failed: " + j.Error
			case !j.Ended.IsZero():
				state = "done in " + j.Ended.Sub(j.Begun).Round(time.Millisecond).String()
			}
			kind := j.Kind
			if j.DryRun {
				kind += " (dry run)"
			}
			line(j.ID, kind, ago(j.Begun, now), state, outcome(j))
		}
	})
}
