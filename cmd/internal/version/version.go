// Package version names the build of a program.
package version

import (
	"runtime"
	"runtime/debug"
	"strings"
)

// Info is what a program knows of its own build.
type Info struct {
	Version  string `json:"version"`            // module version, "(devel)" for a build from a checkout
	Revision string `json:"revision,omitempty"` // of the checkout
	Time     string `json:"time,omitempty"`     // of the revision
	Modified bool   `json:"modified,omitempty"` // the checkout had changes
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

// Get reads the build information that the Go tool has put into the program.
func Get() Info {
	i := Info{Version: "(unknown)", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	b, ok := debug.ReadBuildInfo()
	if !ok {
		return i
	}
	i.Version = b.Main.Version
	for _, s := range b.Settings {
		switch s.Key {
		case "vcs.revision":
			i.Revision = s.Value
		case "vcs.time":
			i.Time = s.Value
		case "vcs.modified":
			i.Modified = s.Value == "true"
		}
	}
	return i
}

// String returns it as one line.
func String() string {
	i := Get()
	parts := []string{i.Version}
	if i.Revision != "" {
		r := i.Revision[:min(12, len(i.Revision))]
		if i.Modified {
			r += "+changes"
		}
		parts = append(parts, r)
	}
	return strings.Join(append(parts, i.Go, i.Platform), " ")
}
