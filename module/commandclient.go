package module

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/caddy-registry/mirror/internal/clients"
	"github.com/caddy-registry/mirror/internal/mirror"
)

func clientCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "client-config [<client>]",
		Short: "Prints or writes the settings of a registry client",
		Long: `
Prints what is to be done so that a client pulls by way of a mirror; without a client,
which ones there are. No server is asked, unless with --check.

--write writes the files instead, on the machine that the client runs on, and prints
what is left to be done. docker's daemon.json keeps its other settings; any other file
that is there already and says something else is left alone, and nothing is written.

--strict leaves no way around the mirror: where that fails, the pull does.

--check then pulls an image by way of the mirror as a client would (the manifest by its
tag and by digest, a layer from its middle on, and whole), and says what is wrong.
`,
		Example: "  caddy registry client-config containerd --mirror https://mirror.example.com\n  caddy registry client-config docker --mirror http://mirror.lan:5000 --write",
		Args:    cobra.MaximumNArgs(1),
		RunE:    clientCommand,
	}
	flags := cmd.Flags()
	flags.String("mirror", "", "The mirror's address, such as https://mirror.example.com")
	flags.StringSlice("for", nil, "A registry to be mirrored; may be repeated (default: all, and those that the mirror knows by itself for clients that have to name them)")
	flags.String("default", "docker.io", "The default registry of the mirror, or off")
	flags.String("ca", "", "The file on the client that has the authority of the mirror's certificate")
	flags.Bool("strict", false, "Leave no way around the mirror")
	flags.Bool("write", false, "Write the files")
	flags.String("root", "/", "The directory below which files are written")
	flags.Bool("check", false, "Pull an image by way of the mirror, and say what is wrong")
	flags.String("image", "docker.io/library/alpine:latest", "The image that is pulled with --check")
	flags.String("lang", "en", "The language of what is printed: en or zh")
	return cmd
}

func clientCommand(cmd *cobra.Command, args []string) error {
	flags := cmd.Flags()
	out := cmd.OutOrStdout()
	lang, err := flags.GetString("lang")
	if err != nil {
		return err
	}
	if lang != "en" && lang != "zh" {
		return fmt.Errorf("--lang %s: there are en and zh", lang)
	}
	if len(args) == 0 {
		for _, name := range []string{"mirror", "write", "check", "strict"} {
			if flags.Changed(name) {
				return fmt.Errorf("--%s is for one client; without one there is a list of them", name)
			}
		}
		if done, err := printJSON(cmd, clients.All); done || err != nil {
			return err
		}
		return table(out, func(line func(...string)) {
			line("CLIENT", "SETTINGS OF")
			for _, c := range clients.All {
				line(c.ID, c.Name.In(lang))
			}
		})
	}
	client, ok := clients.Find(args[0])
	if !ok {
		return fmt.Errorf("there are no settings for %q; caddy registry client-config lists the clients", args[0])
	}
	m, err := mirrorOf(cmd)
	if err != nil {
		return err
	}
	steps, err := client.Steps(m)
	if err != nil {
		return err
	}
	write, err := flags.GetBool("write")
	if err != nil {
		return err
	}
	root, err := flags.GetString("root")
	if err != nil {
		return err
	}
	if !write && flags.Changed("root") {
		return errors.New("--root says where --write writes")
	}
	if write {
		written, err := clients.Write(root, steps)
		for _, name := range written {
			fmt.Fprintln(cmd.ErrOrStderr(), "written:", name)
		}
		if err != nil {
			return err
		}
	}
	if done, err := printJSON(cmd, steps); err != nil {
		return err
	} else if !done {
		printSteps(out, steps, lang, write)
	}
	check, err := flags.GetBool("check")
	if err != nil {
		return err
	}
	if !check {
		if flags.Changed("image") {
			return errors.New("--image says what --check pulls")
		}
		return nil
	}
	name, err := flags.GetString("image")
	if err != nil {
		return err
	}
	image, err := clients.ParseImage(name)
	if err != nil {
		return err
	}
	ctx, stop := untilInterrupted(cmd)
	defer stop()
	return clients.Check(ctx, client, m, image, func(is string) { fmt.Fprintln(cmd.ErrOrStderr(), "ok:", is) })
}

// mirrorOf is the mirror that flags tell of.
func mirrorOf(cmd *cobra.Command) (m clients.Mirror, err error) {
	flags := cmd.Flags()
	for name, to := range map[string]*string{"mirror": &m.URL, "default": &m.Default, "ca": &m.CA} {
		if *to, err = flags.GetString(name); err != nil {
			return m, err
		}
	}
	if m.Strict, err = flags.GetBool("strict"); err != nil {
		return m, err
	}
	names, err := flags.GetStringSlice("for")
	if err != nil {
		return m, err
	}
	if m.URL == "" {
		return m, errors.New("say where the mirror is: --mirror https://mirror.example.com")
	}
	m.URL = strings.TrimRight(m.URL, "/")
	if m.Default == "off" {
		m.Default = ""
	}
	if len(names) == 0 {
		m.Every = true
		for _, name := range mirror.Builtin {
			if !strings.HasPrefix(name, "*") {
				names = append(names, name)
			}
		}
	}
	for _, name := range names {
		m.Registries = append(m.Registries, clients.Registry{Name: mirror.NormalizeHost(name)})
	}
	return m, nil
}

// printSteps prints steps as a shell script with comments; done says that the files are
// there already.
func printSteps(w io.Writer, steps []clients.Step, lang string, done bool) {
	for _, s := range steps {
		if done && s.File != "" {
			continue
		}
		fmt.Fprintf(w, "# %s\n", s.Text.In(lang))
		if s.File != "" {
			fmt.Fprintf(w, "# %s\n", s.File)
		}
		if s.Content != "" {
			fmt.Fprintln(w)
			fmt.Fprint(w, s.Content)
		}
		if s.Commands != "" {
			fmt.Fprintln(w, s.Commands)
		}
		fmt.Fprintln(w)
	}
}
