package clients

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// ErrDiffers is wrapped by the error of a file that is there already and says something
// else.
var ErrDiffers = errors.New("it is there already, and says something else: move it away, or add the settings by hand")

// maxSettings is how large a file of settings may be that is added to, in bytes.
const maxSettings = 1 << 20

// Write puts the files of some steps below a directory, / for the machine's own, and
// returns those that were written. docker's daemon.json keeps what it has, and names the
// mirror before others; any other file that says something else is [ErrDiffers], and
// nothing is written at all.
func Write(root string, steps []Step) (written []string, err error) {
	contents := map[string][]byte{}
	var names []string
	for _, s := range steps {
		if s.File == "" {
			continue
		}
		name := filepath.Join(root, s.File)
		if root == "/" && !filepath.IsAbs(s.File) {
			name = s.File // as the commands that follow call it
		}
		// What a link leads to may be somebody's own place for settings.
		if info, err := os.Lstat(name); err == nil && !info.Mode().IsRegular() {
			return nil, fmt.Errorf("%s is a link, or no file: add the settings by hand", name)
		}
		before, err := os.ReadFile(name)
		after := []byte(s.Content)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return nil, err
		case len(before) > maxSettings:
			return nil, fmt.Errorf("%s: %w", name, ErrDiffers)
		case filepath.Base(name) == "daemon.json":
			if after, err = merge(before, after); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
		case !bytes.Equal(before, after):
			return nil, fmt.Errorf("%s: %w", name, ErrDiffers)
		}
		if bytes.Equal(before, after) && err == nil {
			continue
		}
		contents[name] = after
		names = append(names, name)
	}
	for _, name := range names {
		if err := replace(name, contents[name]); err != nil {
			return written, err
		}
		written = append(written, name)
	}
	return written, nil
}

// merge adds the mirrors of one daemon.json to another.
func merge(before, after []byte) ([]byte, error) {
	const key = "registry-mirrors"
	var is map[string]json.RawMessage
	var has, wants struct {
		Mirrors []string `json:"registry-mirrors"`
	}
	if len(bytes.TrimSpace(before)) == 0 {
		return after, nil // docker takes it for {}
	}
	if err := errors.Join(json.Unmarshal(before, &is), json.Unmarshal(before, &has), json.Unmarshal(after, &wants)); err != nil {
		return nil, fmt.Errorf("it cannot be read, and is left alone: %w", err)
	}
	if len(has.Mirrors) >= len(wants.Mirrors) && slices.Equal(has.Mirrors[:len(wants.Mirrors)], wants.Mirrors) {
		return before, nil
	}
	for _, mirror := range has.Mirrors {
		if !slices.Contains(wants.Mirrors, mirror) {
			wants.Mirrors = append(wants.Mirrors, mirror)
		}
	}
	value, err := json.Marshal(wants.Mirrors)
	if err != nil {
		return nil, err
	}
	if is == nil { // null
		is = map[string]json.RawMessage{}
	}
	is[key] = value
	merged, err := json.MarshalIndent(is, "", "  ")
	return append(merged, '\n'), err
}

// replace writes a file that is there whole or not at all.
func replace(name string, content []byte) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(name), ".settings-*")
	if err != nil {
		return err
	}
	mode := fs.FileMode(0o644)
	if info, err := os.Stat(name); err == nil {
		mode = info.Mode().Perm()
	}
	_, err = f.Write(content)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}
