// Command runc-wrapper is an OCI runtime that takes CAP_SYS_RESOURCE out of a container's
// specification and then becomes the real runc.
//
// Some build machines are containers themselves, without that capability in their bounding set.
// There `docker run --privileged` and runc inside a kind node fail with "unable to apply caps".
// engine.sh and node-image.sh install it only where the capability is missing.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

const missing = "CAP_SYS_RESOURCE"

func main() {
	args := os.Args[1:]
	if path, isProcess := specOf(args); path != "" {
		if err := strip(path, isProcess); err != nil {
			fail(err)
		}
	}
	runc, err := realRunc()
	if err != nil {
		fail(err)
	}
	fail(syscall.Exec(runc, append([]string{runc}, args...), os.Environ()))
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "runc-wrapper:", err)
	os.Exit(1)
}

// specOf returns the file that holds the capabilities of the container or process to start, and
// whether that file is a bare process (runc exec) and not a whole bundle (runc create, runc run).
func specOf(args []string) (string, bool) {
	for i, arg := range args {
		switch arg {
		case "create", "run", "restore":
			bundle := option(args[i+1:], "-b", "--bundle", "-bundle")
			return filepath.Join(bundle, "config.json"), false
		case "exec":
			return option(args[i+1:], "-p", "--process", "-process"), true
		}
	}
	return "", false
}

// option returns the value of the option, written as two arguments or with an equals sign.
func option(args []string, names ...string) string {
	for i, arg := range args {
		for _, name := range names {
			if arg == name && i+1 < len(args) {
				return args[i+1]
			}
			if value, found := strings.CutPrefix(arg, name+"="); found {
				return value
			}
		}
	}
	return ""
}

func strip(path string, isProcess bool) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var document map[string]any
	decoder := json.NewDecoder(bytes.NewReader(content))
	decoder.UseNumber() // seccomp arguments are 64-bit integers
	if err := decoder.Decode(&document); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	process := document
	if !isProcess {
		process, _ = document["process"].(map[string]any)
	}
	sets, _ := process["capabilities"].(map[string]any)
	changed := false
	for name, set := range sets {
		list, _ := set.([]any)
		kept := make([]any, 0, len(list))
		for _, capability := range list {
			if capability != missing {
				kept = append(kept, capability)
			}
		}
		changed = changed || len(kept) != len(list)
		sets[name] = kept
	}
	if !changed {
		return nil
	}
	content, err = json.Marshal(document)
	if err != nil {
		return err
	}
	return os.WriteFile(path, content, 0o600)
}

// realRunc finds the runtime that is wrapped: runc.real beside the wrapper, else the system's.
func realRunc() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	for _, path := range []string{
		filepath.Join(filepath.Dir(self), "runc.real"), "/usr/sbin/runc", "/usr/bin/runc",
	} {
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && path != self {
			return path, nil
		}
	}
	return "", fmt.Errorf("no runc found beside %s or in /usr/sbin, /usr/bin", self)
}
