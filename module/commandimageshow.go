package module

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/caddy-registry/mirror/internal/backing"
)

// imagePage is a part of the list of images.
type imagePage struct {
	Items []backing.Image `json:"items"`
	Next  *string         `json:"next"`
}

func imageList(cmd *cobra.Command, _ []string) error {
	server, err := imageServer(cmd)
	if err != nil {
		return err
	}
	label, err := cmd.Flags().GetString("label")
	if err != nil {
		return err
	}
	ctx, stop := untilInterrupted(cmd)
	defer stop()
	all := []backing.Image{}
	for cursor := ""; ; {
		query := url.Values{"limit": {"1000"}}
		if label != "" {
			query.Set("label", label)
		}
		if cursor != "" {
			query.Set("cursor", cursor)
		}
		var page imagePage
		if err := server.ask(ctx, http.MethodGet, "/v1/backing-images?"+query.Encode(), nil, &page); err != nil {
			return err
		}
		all = append(all, page.Items...)
		if page.Next == nil || *page.Next == "" || *page.Next == cursor {
			break
		}
		cursor = *page.Next
	}
	if done, err := printJSON(cmd, all); done || err != nil {
		return err
	}
	return printImages(cmd.OutOrStdout(), all, time.Now())
}

func printImages(w io.Writer, all []backing.Image, now time.Time) error {
	return table(w, func(line func(...string)) {
		line("IMAGE", "VERSIONS", "LAST", "FORMAT", "SIZE", "VIRTUAL", "CREATED", "TAGS")
		for _, image := range all {
			last := backing.Version{Version: "none"}
			if len(image.Versions) > 0 {
				last = image.Versions[0]
			}
			line(image.Name, number(int64(len(image.Versions))), last.Version, cmp.Or(string(last.Format), string(last.State)), size(last.Size), size(last.VirtualSize), ago(last.CreatedAt, now), strings.Join(tagsOf(image), " "))
		}
	})
}

func tagsOf(image backing.Image) []string {
	var all []string
	for _, tag := range slices.Sorted(maps.Keys(image.Tags)) {
		all = append(all, tag+"="+image.Tags[tag].Version)
	}
	return all
}

func imageShow(cmd *cobra.Command, args []string) error {
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
	if ref.reference == "" {
		var image backing.Image
		if err := server.ask(ctx, http.MethodGet, ref.path(), nil, &image); err != nil {
			return err
		}
		if done, err := printJSON(cmd, image); done || err != nil {
			return err
		}
		return printImage(cmd.OutOrStdout(), image, time.Now())
	}
	v, err := server.version(ctx, ref)
	if err != nil {
		return err
	}
	return printVersion(cmd, v)
}

func printImage(w io.Writer, image backing.Image, now time.Time) error {
	err := table(w, func(line func(...string)) {
		line("image", image.Name)
		for _, key := range slices.Sorted(maps.Keys(image.Labels)) {
			line("label", key+"="+image.Labels[key])
		}
		if image.Protected {
			line("protected", "yes")
		}
		line("created", ago(image.CreatedAt, now))
	})
	if err != nil {
		return err
	}
	fmt.Fprintln(w)
	return table(w, func(line func(...string)) {
		line("VERSION", "STATE", "FORMAT", "SIZE", "VIRTUAL", "CREATED", "TAGS", "LONGHORN")
		for _, v := range image.Versions {
			var registered []string
			for _, r := range v.Registrations {
				registered = append(registered, r.Cluster+": "+string(r.State))
			}
			line(v.Version, string(v.State), string(v.Format), size(v.Size), size(v.VirtualSize), ago(v.CreatedAt, now), strings.Join(v.Tags, " "), strings.Join(registered, ", "))
		}
	})
}

func printVersion(cmd *cobra.Command, v backing.Version) error {
	if done, err := printJSON(cmd, v); done || err != nil {
		return err
	}
	return versionLines(cmd.OutOrStdout(), v, time.Now())
}

// versionLines shows a version.
func versionLines(w io.Writer, v backing.Version, now time.Time) error {
	return table(w, func(line func(...string)) {
		line("version", v.Name+":"+v.Version)
		line("state", strings.TrimSpace(string(v.State)+" "+v.Error))
		if v.Progress != nil && v.State != backing.Ready {
			line("received", progressOf(*v.Progress))
		}
		if v.Digests.SHA512 != "" {
			line("format", string(v.Format))
			line("size", fmt.Sprintf("%s, %s virtual", size(v.Size), size(v.VirtualSize)))
			line("sha256", v.Digests.SHA256.Encoded())
			line("sha512", v.Digests.SHA512.Encoded())
		}
		if v.Probe != nil && !v.Probe.Longhorn.Compatible {
			for _, problem := range v.Probe.Longhorn.Problems {
				line("not for Longhorn", problem.Message)
			}
		}
		if v.Source != nil && v.Source.URL != "" {
			line("from", v.Source.URL)
		}
		if len(v.Tags) > 0 {
			line("tags", strings.Join(v.Tags, " "))
		}
		if v.Protected {
			line("protected", "yes")
		}
		line("created", ago(v.CreatedAt, now))
		if v.URLs.File != "" {
			line("file", v.URLs.File)
		}
		if v.URLs.OCI != "" {
			line("oci", v.URLs.OCI)
		}
		for _, r := range v.Registrations {
			line("longhorn", registrationLine(r))
		}
	})
}

func registrationLine(r backing.Registration) string {
	text := fmt.Sprintf("%s: %s, %s", r.Cluster, r.Name, r.State)
	if r.State == backing.Downloading {
		text += " " + strconv.Itoa(r.Progress) + " %"
	}
	if r.Message != "" {
		text += ": " + r.Message
	}
	return text
}

func progressOf(p backing.Progress) string {
	if p.Total < 0 {
		return size(p.Received)
	}
	return size(p.Received) + " of " + size(p.Total)
}

func imageTag(cmd *cobra.Command, args []string) error {
	server, err := imageServer(cmd)
	if err != nil {
		return err
	}
	ref, err := parseImageRef(args[0])
	if err != nil {
		return err
	}
	remove, err := cmd.Flags().GetBool("delete")
	if err != nil {
		return err
	}
	ctx, stop := untilInterrupted(cmd)
	defer stop()
	path := ref.path() + "/tags/" + url.PathEscape(args[1])
	if remove {
		if ref.reference != "" {
			return fmt.Errorf("a tag is removed from an image: write `image tag --delete %s %s`", ref.name, args[1])
		}
		return server.ask(ctx, http.MethodDelete, path, nil, nil)
	}
	v, err := server.version(ctx, ref)
	if err != nil {
		return err
	}
	if err := server.ask(ctx, http.MethodPut, path, map[string]string{"version": v.Version}, nil); err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s:%s is %s\n", ref.name, args[1], v.Version)
	return nil
}

func imageRemove(cmd *cobra.Command, args []string) error {
	server, err := imageServer(cmd)
	if err != nil {
		return err
	}
	ref, err := parseImageRef(args[0])
	if err != nil {
		return err
	}
	all, err := cmd.Flags().GetBool("all")
	if err != nil {
		return err
	}
	unregister, err := cmd.Flags().GetBool("unregister")
	if err != nil {
		return err
	}
	path := ref.path()
	switch {
	case all && ref.reference != "":
		return fmt.Errorf("--all deletes the image %s; name it without a version", ref.name)
	case !all && ref.reference == "":
		return fmt.Errorf("say which version, as in %s:v1; or --all, and the image goes with all of them", ref.name)
	case !all:
		path += "/versions/" + url.PathEscape(ref.reference)
	}
	if unregister {
		path += "?unregister=true"
	}
	ctx, stop := untilInterrupted(cmd)
	defer stop()
	return server.ask(ctx, http.MethodDelete, path, nil, nil)
}

func imageRegister(cmd *cobra.Command, args []string) error {
	server, err := imageServer(cmd)
	if err != nil {
		return err
	}
	ref, err := parseImageRef(args[0])
	if err != nil {
		return err
	}
	var o backing.RegistrationOptions
	var mode string
	for name, into := range map[string]*string{"cluster": &o.Cluster, "mode": &mode, "name": &o.Name} {
		if *into, err = cmd.Flags().GetString(name); err != nil {
			return err
		}
	}
	o.Mode = backing.Mode(mode)
	if o.MinNumberOfCopies, err = cmd.Flags().GetInt("copies"); err != nil {
		return err
	}
	var wait, remove, forget bool
	for name, into := range map[string]*bool{"ensure": &o.Ensure, "wait": &wait, "delete": &remove, "forget": &forget} {
		if *into, err = cmd.Flags().GetBool(name); err != nil {
			return err
		}
	}
	ctx, stop := untilInterrupted(cmd)
	defer stop()
	v, err := server.version(ctx, ref)
	if err != nil {
		return err
	}
	path := ref.path() + "/versions/" + url.PathEscape(v.Version) + "/registrations"
	if remove || forget {
		if o.Cluster == "" && len(v.Registrations) == 1 {
			o.Cluster = v.Registrations[0].Cluster
		}
		if o.Cluster == "" {
			return fmt.Errorf("%s:%s has %d registrations; say by --cluster which", v.Name, v.Version, len(v.Registrations))
		}
		path += "/" + url.PathEscape(o.Cluster)
		if forget {
			path += "?forget=true"
		}
		return server.ask(ctx, http.MethodDelete, path, nil, nil)
	}
	var r backing.Registration
	if err := server.ask(ctx, http.MethodPost, path, o, &r); err != nil {
		return err
	}
	tick := time.NewTicker(askProgress)
	defer tick.Stop()
	for wait && !settled(r.State) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("the server goes on without you: `caddy registry image show %s:%s` tells how far it is", v.Name, v.Version)
		}
		now, err := server.version(ctx, imageRef{v.Name, v.Version})
		if err != nil {
			return err
		}
		at := slices.IndexFunc(now.Registrations, func(one backing.Registration) bool { return one.Cluster == r.Cluster })
		if at < 0 {
			return fmt.Errorf("the registration with %s is gone", r.Cluster)
		}
		if next := now.Registrations[at]; !settled(next.State) && (next.State != r.State || next.Message != r.Message) {
			fmt.Fprintln(cmd.ErrOrStderr(), registrationLine(next))
		}
		r = now.Registrations[at]
	}
	if done, err := printJSON(cmd, r); done || err != nil {
		return err
	}
	fmt.Fprintln(cmd.OutOrStdout(), registrationLine(r))
	if wait && r.State != backing.InLonghorn && r.State != backing.Degraded {
		return fmt.Errorf("Longhorn %s does not have %s:%s ready: it is %s", r.Cluster, v.Name, v.Version, r.State)
	}
	return nil
}

// settled reports whether a registration has come to where waiting ends.
func settled(s backing.RegistrationState) bool {
	return s != backing.Pending && s != backing.Downloading && s != backing.Unknown
}
