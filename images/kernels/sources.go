package kernels

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A source is one entry of apt's sources, of either format, reduced to what a fetch needs.
type source struct {
	uris       []string
	suites     []string
	components []string
	// options are carried over verbatim, under their deb822 names: Signed-By, Trusted, …
	options [][2]string
}

// carried are the options that say how an archive is reached and trusted. Architectures, Languages and Targets are
// our own to set.
var carried = map[string]string{
	"signed-by": "Signed-By", "trusted": "Trusted", "allow-insecure": "Allow-Insecure", "allow-weak": "Allow-Weak",
	"check-valid-until": "Check-Valid-Until", "valid-until-min": "Valid-Until-Min", "valid-until-max": "Valid-Until-Max",
	"check-date": "Check-Date", "date-max-future": "Date-Max-Future", "inrelease-path": "InRelease-Path", "snapshot": "Snapshot",
}

// releases are Debian's codenames and aliases: what a suite must be called for its mirror to be one of Debian's.
var releases = []string{
	"oldoldstable", "oldstable", "stable", "testing", "unstable", "sid",
	"buster", "bullseye", "bookworm", "trixie", "forky", "duke",
}

// readSources reads sources.list, sources.list.d/*.list and *.sources under etc (normally /etc/apt).
func readSources(etc string) ([]source, error) {
	names := []string{filepath.Join(etc, "sources.list")}
	for _, pattern := range []string{"*.list", "*.sources"} {
		more, err := filepath.Glob(filepath.Join(etc, "sources.list.d", pattern))
		if err != nil {
			return nil, err
		}
		names = append(names, more...)
	}
	var all []source
	for _, name := range names {
		b, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read apt's sources: %w", err)
		}
		if strings.HasSuffix(name, ".sources") {
			all = append(all, parseDeb822(b)...)
		} else {
			all = append(all, parseOneLine(b)...)
		}
	}
	return all, nil
}

// parseOneLine parses the one-line format: deb [option=value …] uri suite [component …]. Lines that are not of that
// form are left out: they are apt's to complain about.
func parseOneLine(b []byte) []source {
	var all []source
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		line, _, _ := strings.Cut(sc.Text(), "#")
		kind, rest, _ := strings.Cut(strings.TrimSpace(strings.ReplaceAll(line, "\t", " ")), " ")
		if kind != "deb" {
			continue
		}
		var s source
		rest = strings.TrimSpace(rest)
		if strings.HasPrefix(rest, "[") {
			options, after, ok := strings.Cut(rest[1:], "]")
			if !ok {
				continue
			}
			for _, o := range strings.Fields(options) {
				k, v, _ := strings.Cut(o, "=")
				if name, ok := carried[strings.ToLower(strings.TrimRight(k, "+-"))]; ok {
					s.options = append(s.options, [2]string{name, strings.ReplaceAll(v, ",", " ")})
				}
			}
			rest = after
		}
		f := strings.Fields(rest)
		if len(f) < 3 { // an entry without components is a flat repository
			continue
		}
		s.uris, s.suites, s.components = f[:1], f[1:2], f[2:]
		all = append(all, s)
	}
	return all
}

// parseDeb822 parses the format of .sources files. Options may have several lines (a key in Signed-By has).
func parseDeb822(b []byte) []source {
	var all []source
	stanza := map[string]string{}
	var last string
	flush := func() {
		defer func() { stanza, last = map[string]string{}, "" }()
		if !slices.Contains(strings.Fields(stanza["types"]), "deb") || disabled(stanza["enabled"]) {
			return
		}
		s := source{
			uris: strings.Fields(stanza["uris"]), suites: strings.Fields(stanza["suites"]),
			components: strings.Fields(stanza["components"]),
		}
		if len(s.uris) == 0 || len(s.suites) == 0 || len(s.components) == 0 {
			return
		}
		for k, v := range stanza {
			if name, ok := carried[k]; ok {
				s.options = append(s.options, [2]string{name, v})
			}
		}
		slices.SortFunc(s.options, func(a, b [2]string) int { return strings.Compare(a[0], b[0]) })
		all = append(all, s)
	}
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		line := sc.Text()
		switch {
		case strings.HasPrefix(line, "#"):
		case strings.TrimSpace(line) == "":
			flush()
		case line[0] == ' ' || line[0] == '\t':
			if last != "" {
				stanza[last] += "\n" + line
			}
		default:
			k, v, ok := strings.Cut(line, ":")
			if !ok {
				last = ""
				continue
			}
			last = strings.ToLower(strings.TrimSpace(k))
			stanza[last] = strings.TrimSpace(v)
		}
	}
	flush()
	return all
}

func disabled(v string) bool {
	switch strings.ToLower(strings.TrimSpace(v)) {
	case "no", "false", "without", "off", "disable":
		return true
	}
	return false
}

// retarget keeps the entries of a Debian release's main component and points them at the release that is asked for:
// a machine that runs a newer or older Debian reaches the same mirrors, and the archive's keyrings overlap.
// Suites other than the release itself, its -updates and its -security are dropped.
func retarget(sources []source, release string) []source {
	var all []source
	seen := map[string]bool{}
	for _, s := range sources {
		if !slices.Contains(s.components, "main") {
			continue
		}
		for _, suite := range s.suites {
			name, kind := suite, ""
			for _, k := range []string{"-updates", "-security"} {
				if n, ok := strings.CutSuffix(suite, k); ok {
					name, kind = n, k
				}
			}
			if !slices.Contains(releases, name) || release == "sid" && kind != "" { // sid is never updated, only moved on
				continue
			}
			for _, uri := range s.uris {
				key := uri + " " + kind
				if seen[key] {
					continue
				}
				seen[key] = true
				options := s.options
				if release == "sid" {
					options = lasting(options)
				}
				all = append(all, source{
					uris: []string{uri}, suites: []string{release + kind}, components: []string{"main"}, options: options,
				})
			}
		}
	}
	return all
}

// lasting takes the archive's lists however old they are, as long as they are signed. Sid's end a week after they were made, and a mirror
// that no longer follows it would leave a machine without a kernel that only tests boot.
func lasting(options [][2]string) [][2]string {
	const key = "Check-Valid-Until"
	others := slices.DeleteFunc(slices.Clone(options), func(o [2]string) bool { return o[0] == key })
	return append(others, [2]string{key, "no"})
}

// deb822 writes entries for one architecture, only its package lists and no translations.
func deb822(sources []source, arch string) []byte {
	var b bytes.Buffer
	for _, s := range sources {
		fmt.Fprintf(&b, "Types: deb\nURIs: %s\nSuites: %s\nComponents: %s\nArchitectures: %s\nTargets: Packages\nLanguages: none\n",
			strings.Join(s.uris, " "), strings.Join(s.suites, " "), strings.Join(s.components, " "), arch)
		for _, o := range s.options {
			fmt.Fprintf(&b, "%s: %s\n", o[0], o[1])
		}
		b.WriteString("\n")
	}
	return b.Bytes()
}
