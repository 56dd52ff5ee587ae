package kernel

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// The VMCOREINFO note is what the kernel leaves for those who read its memory without it: an ELF note, page-aligned in
// memory (vmcoreinfo_note, kernel/crash_core.c or kernel/vmcore_info.c), whose text is one KEY=VALUE a line.
const (
	noteNamesz    = 11 // len("VMCOREINFO\x00")
	noteHeaderLen = 24 // Elf64_Nhdr and the padded name
	noteMaxDesc   = 4096
)

var noteName = []byte("VMCOREINFO\x00")

// errNoNote means that a page does not begin with a VMCOREINFO note.
var errNoNote = fmt.Errorf("%w: no VMCOREINFO note", ErrNotFound)

// noteDesc checks the first 24 bytes of a VMCOREINFO note and returns the length of its text, which follows.
func noteDesc(header []byte) (int, error) {
	if len(header) < noteHeaderLen || binary.LittleEndian.Uint32(header) != noteNamesz ||
		!bytes.Equal(header[12:12+noteNamesz], noteName) {
		return 0, errNoNote
	}
	n := binary.LittleEndian.Uint32(header[4:])
	// A length of zero is a note that is being made: update_vmcoreinfo_note writes the header first.
	if n == 0 || n > noteMaxDesc {
		return 0, fmt.Errorf("VMCOREINFO note of %d bytes: %w", n, ErrNotYet)
	}
	return int(n), nil
}

// vmcoreinfo is a parsed VMCOREINFO text.
type vmcoreinfo struct {
	pa     hostmem.PhysAddr // of the note; zero if it was not read from host memory
	text   string
	values map[string]string
}

// parseVMCOREINFO parses the text of a note. A text that is not one yet is ErrNotYet.
func parseVMCOREINFO(text []byte) (*vmcoreinfo, error) {
	text = bytes.TrimRight(text, "\x00")
	if len(text) > noteMaxDesc {
		return nil, fmt.Errorf("VMCOREINFO of %d bytes is too long", len(text))
	}
	v := &vmcoreinfo{text: string(text), values: make(map[string]string, 128)}
	for line := range strings.Lines(v.text) {
		line = strings.TrimSuffix(line, "\n")
		if line == "" {
			continue
		}
		for _, c := range []byte(line) {
			if c < ' ' || c > '~' {
				return nil, fmt.Errorf("VMCOREINFO line %q is not text: %w", line, ErrNotYet)
			}
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			return nil, fmt.Errorf("VMCOREINFO line %q is not KEY=VALUE: %w", line, ErrNotYet)
		}
		if _, twice := v.values[key]; !twice {
			v.values[key] = value
		}
	}
	for _, key := range []string{"OSRELEASE", "PAGESIZE"} {
		if v.values[key] == "" {
			return nil, fmt.Errorf("VMCOREINFO without %s: %w", key, ErrNotYet)
		}
	}
	return v, nil
}

// symbol returns SYMBOL(name), which is hexadecimal without prefix.
func (v *vmcoreinfo) symbol(name string) (VirtAddr, bool) {
	n, err := strconv.ParseUint(v.values["SYMBOL("+name+")"], 16, 64)
	return VirtAddr(n), err == nil
}

// number returns NUMBER(name): decimal with sign, or hexadecimal with prefix; the upper half wraps around.
func (v *vmcoreinfo) number(name string) (int64, bool) {
	s := v.values["NUMBER("+name+")"]
	if hex, ok := strings.CutPrefix(s, "0x"); ok {
		n, err := strconv.ParseUint(hex, 16, 64)
		return int64(n), err == nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil
}

// entry is one KEY(NAME)=VALUE line.
type vmcoreEntry struct{ kind, name, value string }

// entries calls f for every KEY(NAME)=VALUE line in the order of the text.
func (v *vmcoreinfo) entries(f func(vmcoreEntry)) {
	for line := range strings.Lines(v.text) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		kind, name, ok := strings.Cut(key, "(")
		if name, closed := strings.CutSuffix(name, ")"); ok && closed {
			f(vmcoreEntry{kind, name, value})
		}
	}
}

// readNote reads and parses the note at pa.
func readNote(mem hostmem.Memory, pa hostmem.PhysAddr) (*vmcoreinfo, error) {
	var header [noteHeaderLen]byte
	if _, err := mem.ReadAt(header[:], int64(pa)); err != nil {
		return nil, err
	}
	n, err := noteDesc(header[:])
	if err != nil {
		return nil, err
	}
	text := make([]byte, n)
	if _, err := mem.ReadAt(text, int64(pa)+noteHeaderLen); err != nil {
		return nil, err
	}
	v, err := parseVMCOREINFO(text)
	if err != nil {
		return nil, err
	}
	v.pa = pa
	return v, nil
}

func parseUint(s string) (uint64, error) { return strconv.ParseUint(s, 10, 64) }

func parseHex(s string) (uint64, error) { return strconv.ParseUint(s, 16, 64) }
