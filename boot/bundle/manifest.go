package bundle

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// A Manifest says what a bundle is and what it is for.
type Manifest struct {
	Format  int    `json:"format"`  // 1
	Product string `json:"product"` // what it is a version of, such as "backdoor"
	Machine string `json:"machine"` // the class of machines that it runs on, such as "dpu-arm64"
	Version string `json:"version"` // for people, and for [CompareVersions]
	// Epoch is the security epoch. It rises when a hole is closed that nobody must be able to go back to, and then only: devices
	// count it in hardware, one step at a time, and never take less again.
	Epoch    uint32    `json:"epoch"`
	Released time.Time `json:"released"` // UTC, whole seconds
	Expires  time.Time `json:"expires"`  // UTC, whole seconds: not to be installed after that
	// MinLoader is the lowest version of the loader that can start it.
	MinLoader uint32 `json:"minLoader"`
	// CommandLine is the kernel's. The loader adds to it which slot it is.
	CommandLine string `json:"commandLine"`
	Parts       []Part `json:"parts"`
	// Notes are for people and tools; no device decides by them. They are where later versions may add things that old devices
	// need not understand.
	Notes map[string]string `json:"notes,omitempty"`
}

// A Part is one file of a bundle.
type Part struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`   // bytes
	SHA256 string `json:"sha256"` // lower-case hexadecimal
}

// The names that parts can have.
const (
	PartKernel    = "kernel"
	PartInitramfs = "initramfs"
	PartDTB       = "dtb"
)

// Bounds of a manifest. Arm's kernels cut a command line off at 1024 bytes (COMMAND_LINE_SIZE), and the loader adds to it.
const (
	maxPart        = 2 << 30 // bytes
	maxCommandLine = 896     // bytes
	maxNotes       = 16
	maxNote        = 512 // bytes
)

func (p Part) digest() []byte {
	b, err := hex.DecodeString(p.SHA256)
	if err != nil {
		return nil
	}
	return b
}

// Validate reports everything that is wrong with a manifest.
func (m *Manifest) Validate() error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	if m.Format != 1 {
		bad("format %d: this program knows format 1", m.Format)
	}
	if !plain(m.Product, "") {
		bad("product %q: want lower-case letters, digits and hyphens, 1 to 64", m.Product)
	}
	if !plain(m.Machine, "") {
		bad("machine %q: want lower-case letters, digits and hyphens, 1 to 64", m.Machine)
	}
	if !plain(m.Version, "ABCDEFGHIJKLMNOPQRSTUVWXYZ.+_~") {
		bad("version %q: want letters, digits and any of -.+_~, 1 to 64", m.Version)
	}
	if m.Epoch == 0 {
		bad("epoch 0: the first is 1")
	}
	for name, t := range map[string]time.Time{"released": m.Released, "expires": m.Expires} {
		if !wholeSecond(t) {
			bad("%s %s: want whole seconds in UTC", name, t)
		}
	}
	if !m.Expires.After(m.Released) {
		bad("it expires at %s, before it was released", m.Expires)
	}
	if len(m.CommandLine) > maxCommandLine || !printable(m.CommandLine) {
		bad("commandLine: want at most %d printable ASCII characters", maxCommandLine)
	}
	seen := map[string]bool{}
	for i, p := range m.Parts {
		if p.Name != PartKernel && p.Name != PartInitramfs && p.Name != PartDTB {
			bad("parts[%d]: %q is not the name of a part", i, p.Name)
		}
		if seen[p.Name] {
			bad("parts[%d]: %q is there twice", i, p.Name)
		}
		seen[p.Name] = true
		if p.Size < 1 || p.Size > maxPart {
			bad("parts[%d]: size %d: want 1 to %d", i, p.Size, int64(maxPart))
		}
		if len(p.digest()) != 32 || strings.ToLower(p.SHA256) != p.SHA256 {
			bad("parts[%d]: sha256 is not 64 lower-case hexadecimal digits", i)
		}
	}
	if !seen[PartKernel] || !seen[PartInitramfs] {
		bad("a kernel and an initramfs are needed")
	}
	if len(m.Notes) > maxNotes {
		bad("%d notes: want at most %d", len(m.Notes), maxNotes)
	}
	for k, v := range m.Notes {
		if !plain(k, ".") || len(v) > maxNote || !printable(v) {
			bad("note %q: want a short name and at most %d printable ASCII characters", k, maxNote)
		}
	}
	return errors.Join(errs...)
}

// wholeSecond reports whether a time is written in the one way that there is.
func wholeSecond(t time.Time) bool {
	return t.Nanosecond() == 0 && t.Location() == time.UTC && t.Year() >= 2000 && t.Year() < 10000
}

// plain reports whether s is a name of lower-case letters, digits, hyphens, and the characters in more.
func plain(s, more string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for _, c := range s {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && !strings.ContainsRune(more, c) {
			return false
		}
	}
	return true
}

func printable(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// CompareVersions orders versions: numbers in them by value, the rest by its characters. It returns -1, 0 or 1.
func CompareVersions(a, b string) int {
	for a != "" && b != "" {
		x, restA := run(a)
		y, restB := run(b)
		if x != y {
			n, errN := strconv.ParseUint(x, 10, 64)
			m, errM := strconv.ParseUint(y, 10, 64)
			switch {
			case errN == nil && errM == nil && n < m:
				return -1
			case errN == nil && errM == nil && n > m:
				return 1
			case errN != nil || errM != nil:
				return strings.Compare(x, y)
			}
		}
		a, b = restA, restB
	}
	return strings.Compare(a, b)
}

// run cuts the first run of digits or of other characters off.
func run(s string) (first, rest string) {
	digit := func(c byte) bool { return c >= '0' && c <= '9' }
	i := 1
	for i < len(s) && digit(s[i]) == digit(s[0]) {
		i++
	}
	return s[:i], s[i:]
}
