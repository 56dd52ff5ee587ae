package kernel

import (
	"encoding/binary"
	"strings"
	"testing"
)

// crashNoteOf is what append_elf_note and final_note leave (kernel/crash_core.c).
func crashNoteOf(descsz uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 5)
	b = binary.LittleEndian.AppendUint32(b, descsz)
	b = binary.LittleEndian.AppendUint32(b, 1)
	return append(append(b, "CORE\x00\x00\x00\x00"...), make([]byte, 400)...)
}

func TestCrashNote(t *testing.T) {
	for _, c := range []struct {
		what string
		note []byte
		want int // negative: refused
	}{
		{"x86-64", crashNoteOf(336), 356}, {"aarch64", crashNoteOf(392), 412}, {"unaligned", crashNoteOf(333), 356},
		{"none", make([]byte, 400), 0}, {"longer than its page", crashNoteOf(401), -1}, {"empty", crashNoteOf(0), -1},
		{"huge", crashNoteOf(1<<32 - 1), -1}, {"cut", crashNoteOf(336)[:11], -1},
		{"another's name", []byte(strings.Replace(string(crashNoteOf(336)), "CORE", "CORF", 1)), -1},
	} {
		n, err := crashNote(c.note)
		if (err != nil) != (c.want < 0) || err == nil && n != c.want {
			t.Errorf("%s: crashNote = %d, %v; want %d", c.what, n, err, c.want)
		}
	}
}

func FuzzCrashNote(f *testing.F) {
	f.Add(crashNoteOf(336))
	f.Add(make([]byte, 12))
	f.Fuzz(func(t *testing.T, b []byte) {
		if n, err := crashNote(b); n < 0 || n > len(b) || err != nil && n != 0 {
			t.Errorf("crashNote = %d of %d bytes, %v", n, len(b), err)
		}
	})
}
