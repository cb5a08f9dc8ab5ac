package module

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/caddy-registry/mirror/internal/mirror"
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "registry",
		Usage: "[--address <interface>] [--config <path> [--adapter <name>]]",
		Short: "Commands for the running registry mirror",
		Long: `
Talks to the registry mirror of the running Caddy instance, over its admin API.

The address of the admin API is taken from the --address flag if specified;
otherwise from the given config file; otherwise the default is assumed.
`,
		CobraFunc: func(cmd *cobra.Command) {
			flags := cmd.PersistentFlags()
			flags.String("address", "", "The address to use to reach the admin API endpoint, if not the default")
			flags.StringP("config", "c", "", "Configuration file to use to parse the admin address, if --address is not used")
			flags.StringP("adapter", "a", "", "Name of config adapter to apply (when --config is used)")
			flags.Bool("json", false, "Print the admin API's answer rather than a table")
			// With a RunE, a misspelt command is an error.
			cmd.Args = cobra.NoArgs
			cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
			cmd.AddCommand(refreshCmd(), clientCmd(), backingCmd(), imageCmd())
			cmd.AddCommand(storeCmds()...)
			cmd.AddCommand(workCmds()...)
		},
	})
}

func refreshCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "refresh <reference>...",
		Short: "Checks now what tags mean upstream",
		Long: `
Asks the upstream what each tag means now, however lately that was done, and
fetches the manifests of those that have moved. Without a registry a reference
means docker.io, and without a tag latest.

One line is printed for each:

	docker.io/library/alpine:3.20 sha256:... unchanged
	docker.io/library/alpine:3.20 sha256:... (was sha256:...)
	docker.io/library/alpine:3.20 sha256:... (not held before)

What fails is told of on stderr, the other references are refreshed all the
same, and the exit status is 1.
`,
		Example: "  caddy registry refresh alpine:3.20 ghcr.io/org/app:v1",
		Args:    cobra.MinimumNArgs(1),
		RunE:    refreshCommand,
	}
}

func refreshCommand(cmd *cobra.Command, references []string) error {
	admin, err := adminAPI(cmd)
	if err != nil {
		return err
	}
	failed := 0
	for _, reference := range references {
		var done mirror.Refreshed
		if err := admin.ask(http.MethodPost, "refresh", map[string]string{"reference": reference}, &done); err != nil {
			fmt.Fprintf(cmd.ErrOrStderr(), "%s: %v\n", reference, err)
			failed++
			continue
		}
		if shown, err := printJSON(cmd, done); shown || err != nil {
			if err != nil {
				return err
			}
			continue
		}
		outcome := "unchanged"
		switch {
		case done.Before == "":
			outcome = "(not held before)"
		case done.Changed:
			outcome = fmt.Sprintf("(was %s)", done.Before)
		}
		fmt.Fprintln(cmd.OutOrStdout(), done.Reference, done.Digest, outcome)
	}
	if failed > 0 {
		cmd.SilenceErrors = true // each has been told of
		return fmt.Errorf("%d of %d references could not be refreshed", failed, len(references))
	}
	return nil
}

// adminAPI finds the admin API that a command is for.
func adminAPI(cmd *cobra.Command) (api, error) {
	var values [3]string
	for i, name := range [...]string{"address", "config", "adapter"} {
		var err error
		if values[i], err = cmd.Flags().GetString(name); err != nil {
			return "", err
		}
	}
	address, err := caddycmd.DetermineAdminAPIAddress(values[0], nil, values[1], values[2])
	if err != nil {
		return "", fmt.Errorf("finding the admin API's address; give it by --address: %w", err)
	}
	return api(address), nil
}

// maxReply bounds an answer of the admin API.
const maxReply = 16 << 20

// An api is the admin API at an address.
type api string

// ask puts a question to it, or none with nil, and reads the answer. Its error
// is the server's sentence, where it has one.
func (a api) ask(method, path string, question, answer any) error {
	var body io.Reader = http.NoBody
	if question != nil {
		encoded, err := json.Marshal(question)
		if err != nil {
			return err
		}
		body = bytes.NewReader(encoded)
	}
	resp, err := caddycmd.AdminAPIRequest(string(a), method, "/registry/"+path, nil, body)
	if err != nil {
		return plain(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxReply)).Decode(answer); err != nil {
		return fmt.Errorf("the admin API at %s gives an answer that cannot be read: %w", string(a), err)
	}
	return nil
}

// printJSON prints an answer of the API as it is, if the command was asked to.
func printJSON(cmd *cobra.Command, answer any) (done bool, err error) {
	if as, err := cmd.Flags().GetBool("json"); err != nil || !as {
		return false, err
	}
	encoder := json.NewEncoder(cmd.OutOrStdout())
	encoder.SetIndent("", "  ")
	return true, encoder.Encode(answer)
}

// plain takes the sentence out of the JSON that [caddycmd.AdminAPIRequest]
// quotes.
func plain(err error) error {
	_, quoted, ok := strings.Cut(err.Error(), "{")
	var reply struct {
		Error string `json:"error"`
	}
	if ok && json.Unmarshal([]byte("{"+quoted), &reply) == nil && reply.Error != "" {
		return errors.New(reply.Error)
	}
	return err
}
