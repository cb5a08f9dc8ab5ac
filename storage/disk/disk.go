// Package disk is the guest module registry.storage.disk: a store that is a
// directory of plain files.
package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/dustin/go-humanize"

	"github.com/caddy-registry/mirror/storage"
)

func init() {
	caddy.RegisterModule(new(Disk))
}

// Disk keeps content in a directory, in the tree of registry:2: a directory
// that registry:2 or distribution has written can be used as it is, and they
// can serve what the mirror has written.
//
// One process at a time uses a directory; a second one is refused with the
// process number of the first.
type Disk struct {
	// The directory. It is made when first needed, and must be writable by
	// the user Caddy runs as. Placeholders such as {env.HOME} are resolved.
	// Default: `registry` in Caddy's data directory.
	Directory string `json:"directory,omitempty"`

	// How much of the filesystem must stay free: a number of bytes (`20GiB`)
	// or a share of its size (`10%`). What would leave less is not kept, but
	// passed through from the upstream. Default: 10%.
	MinFree string `json:"min_free,omitempty"`

	// How much the store may take: a number of bytes (`500GiB`), or `off`. When
	// it is nearly that much, what has not been pulled for longest is evicted.
	// Default: off.
	MaxSize string `json:"max_size,omitempty"`

	// The largest blob that is mirrored: a number of bytes (`20GiB`), or `off`.
	// An image with a larger one is refused at its manifest. Default: off.
	MaxBlobSize string `json:"max_blob_size,omitempty"`

	// Permissions of new files, in octal, less the umask. Default: 0640.
	FileMode string `json:"file_mode,omitempty"`

	// Permissions of new directories, in octal, less the umask. Default: 0750.
	DirectoryMode string `json:"directory_mode,omitempty"`

	settings settings
	limits   storage.Limits
}

// settings are what Configure may change in a store that is open.
type settings struct {
	minFree  minFree
	fileMode fs.FileMode
	dirMode  fs.FileMode
}

// minFree is a number of bytes, or a share of the filesystem.
type minFree struct {
	text    string
	bytes   uint64
	percent float64
}

func (m minFree) of(total uint64) uint64 {
	if m.percent > 0 {
		return uint64(float64(total) * m.percent / 100)
	}
	return m.bytes
}

// CaddyModule returns the Caddy module information.
func (*Disk) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "registry.storage.disk",
		New: func() caddy.Module { return new(Disk) },
	}
}

// Provision fills in defaults and checks them, and touches nothing: it also
// runs beside a live mirror, for `caddy validate`.
func (d *Disk) Provision(caddy.Context) error {
	repl := caddy.NewReplacer()
	directory, err := repl.ReplaceOrErr(d.Directory, true, true)
	if err != nil {
		return fmt.Errorf("directory: %w", err)
	}
	if directory == "" {
		directory = filepath.Join(caddy.AppDataDir(), "registry")
	}
	if directory, err = filepath.Abs(directory); err != nil {
		return fmt.Errorf("directory: %w", err)
	}
	d.Directory, err = canonical(directory)
	if err != nil {
		return err
	}
	if d.settings.minFree, err = parseMinFree(d.MinFree); err != nil {
		return err
	}
	if d.limits.MaxSize, err = storage.ParseLimit("max_size", d.MaxSize); err != nil {
		return err
	}
	if d.limits.MaxBlobSize, err = storage.ParseLimit("max_blob_size", d.MaxBlobSize); err != nil {
		return err
	}
	if d.settings.fileMode, err = parseMode("file_mode", d.FileMode, 0o640); err != nil {
		return err
	}
	if d.settings.dirMode, err = parseMode("directory_mode", d.DirectoryMode, 0o750); err != nil {
		return err
	}
	if d.settings.fileMode&0o600 != 0o600 || d.settings.dirMode&0o700 != 0o700 {
		return errors.New("mode: the owner needs read and write on files, and all rights on directories")
	}
	return nil
}

// canonical resolves the part of a path that exists, so that one directory has
// one identity whatever links lead to it, and checks that the rest can be made.
func canonical(path string) (string, error) {
	rest := ""
	for at := path; ; at = filepath.Dir(at) {
		resolved, err := filepath.EvalSymlinks(at)
		if err == nil {
			info, err := os.Stat(resolved)
			if err != nil {
				return "", fmt.Errorf("directory: %w", err)
			}
			if !info.IsDir() {
				return "", fmt.Errorf("directory: %s is a file", resolved)
			}
			return filepath.Join(resolved, rest), nil
		}
		if !errors.Is(err, fs.ErrNotExist) || at == filepath.Dir(at) {
			return "", fmt.Errorf("directory: %w", err)
		}
		rest = filepath.Join(filepath.Base(at), rest)
	}
}

func parseMinFree(s string) (minFree, error) {
	if s == "" {
		s = "10%"
	}
	if number, ok := strings.CutSuffix(s, "%"); ok {
		percent, err := strconv.ParseFloat(number, 64)
		if err != nil || percent < 0 || percent >= 100 {
			return minFree{}, fmt.Errorf("min_free: %q is not a percentage below 100", s)
		}
		return minFree{text: s, percent: percent}, nil
	}
	bytes, err := humanize.ParseBytes(s)
	if err != nil {
		return minFree{}, fmt.Errorf("min_free: %q is neither a size (20GiB) nor a percentage (10%%)", s)
	}
	return minFree{text: s, bytes: bytes}, nil
}

func parseMode(option, s string, byDefault fs.FileMode) (fs.FileMode, error) {
	if s == "" {
		return byDefault, nil
	}
	mode, err := strconv.ParseUint(s, 8, 32)
	if err != nil || mode > 0o7777 {
		return 0, fmt.Errorf("%s: %q is not an octal mode such as 0640", option, s)
	}
	return fs.FileMode(mode), nil
}

// UnmarshalCaddyfile sets up the store from Caddyfile tokens:
//
//	storage disk [<directory>] {
//		max_size      <size>|off
//		min_free      <size>|<percent>
//		max_blob_size <size>|off
//		mode          <file> <directory>
//	}
func (d *Disk) UnmarshalCaddyfile(tok *caddyfile.Dispenser) error {
	tok.Next() // the module's name
	if tok.NextArg() {
		d.Directory = tok.Val()
	}
	if tok.NextArg() {
		return tok.ArgErr()
	}
	seen := map[string]bool{}
	for nesting := tok.Nesting(); tok.NextBlock(nesting); {
		option := tok.Val()
		if seen[option] {
			return tok.Errf("%s is given twice", option)
		}
		seen[option] = true
		switch option {
		case "min_free":
			if !tok.AllArgs(&d.MinFree) {
				return tok.ArgErr()
			}
			if _, err := parseMinFree(d.MinFree); err != nil {
				return tok.WrapErr(err)
			}
		case "max_size":
			if err := unmarshalLimit(tok, &d.MaxSize); err != nil {
				return err
			}
		case "max_blob_size":
			if err := unmarshalLimit(tok, &d.MaxBlobSize); err != nil {
				return err
			}
		case "mode":
			if !tok.AllArgs(&d.FileMode, &d.DirectoryMode) {
				return tok.ArgErr()
			}
			if _, err := parseMode(option, d.FileMode, 0); err != nil {
				return tok.WrapErr(err)
			}
			if _, err := parseMode(option, d.DirectoryMode, 0); err != nil {
				return tok.WrapErr(err)
			}
		default:
			return tok.Errf("unrecognized option %q of disk storage; it has max_size, min_free, max_blob_size and mode", option)
		}
	}
	return nil
}

func unmarshalLimit(tok *caddyfile.Dispenser, into *string) error {
	option := tok.Val()
	if !tok.AllArgs(into) {
		return tok.ArgErr()
	}
	if *into == "" {
		return tok.Errf(`%s: "" is neither a size such as 500GiB nor off`, option)
	}
	if _, err := storage.ParseLimit(option, *into); err != nil {
		return tok.WrapErr(err)
	}
	return nil
}

// Identity is the directory, with links resolved.
func (d *Disk) Identity() string { return "disk:" + d.Directory }

// Open makes the directory, locks it, removes what a killed process left half
// written, and finds out what a loss of power may have damaged.
func (d *Disk) Open(context.Context) (storage.Store, error) {
	return open(d.Directory, d.settings, thisHost())
}

// Limits implements [storage.Backend].
func (d *Disk) Limits() storage.Limits { return d.limits }

// Configure implements [storage.Backend].
func (d *Disk) Configure(s storage.Store) error {
	store, ok := s.(*store)
	if !ok {
		return fmt.Errorf("disk: %T is not a disk store", s)
	}
	store.settings.Store(&d.settings)
	return nil
}

var (
	_ caddy.Provisioner     = (*Disk)(nil)
	_ caddyfile.Unmarshaler = (*Disk)(nil)
	_ storage.Backend       = (*Disk)(nil)
)
