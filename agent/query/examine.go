package query

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Examined is the answer to "what is at this address?".
type Examined struct {
	Extent
	Addr   kernel.VirtAddr `json:"addr"`
	Format string          `json:"format"` // one letter of gdb's
	Size   int             `json:"size"`   // bytes of a unit; zero of strings
	Values []Unit          `json:"values"`
}

// Unit is a piece of memory.
type Unit struct {
	Addr kernel.VirtAddr `json:"addr"`
	Text string          `json:"text"`
	// Symbol is what the address is in, if that is known: of each unit that begins a line.
	Symbol string `json:"symbol,omitempty"`
}

// unitFormat is what stands behind x/ in gdb(1): a count, a format and a size.
type unitFormat struct {
	count, size int
	format      byte
}

const maxExamined = 1 << 16 // bytes, or units

// parseUnits parses 8xg. What is not said is one unit, in hexadecimal, of 8 bytes.
func parseUnits(s string) (unitFormat, error) {
	u := unitFormat{count: 1, size: 8, format: 'x'}
	wrong := &ArgumentError{s, fmt.Sprintf("a count of up to %d, a format (x, d, u, o, t, c, a or s) and a size (b, h, w or g), as in 8xg", maxExamined)}
	digits := len(s) - len(strings.TrimLeft(s, "0123456789"))
	if digits > 0 {
		n, err := strconv.Atoi(s[:digits])
		if err != nil || n == 0 || n > maxExamined {
			return u, wrong
		}
		u.count = n
	}
	sized := false
	for _, c := range []byte(s[digits:]) {
		switch {
		case strings.IndexByte("xduotcas", c) >= 0:
			u.format = c
		case strings.IndexByte("bhwg", c) >= 0:
			u.size, sized = map[byte]int{'b': 1, 'h': 2, 'w': 4, 'g': 8}[c], true
		default:
			return u, wrong
		}
	}
	switch {
	case u.format == 'c' && !sized:
		u.size = 1
	case u.format == 'a':
		u.size = 8
	}
	if u.count*u.size > maxExamined {
		return u, wrong
	}
	return u, nil
}

// Examine reads memory at an address of the kernel, in the way that the first argument says.
func Examine(ctx context.Context, v *kernel.View, args []string) (Examined, error) {
	e := Examined{Extent: now(ctx), Values: []Unit{}}
	u, err := parseUnits(strings.TrimPrefix(args[0], "/"))
	if err != nil {
		return e, err
	}
	if e.Addr, err = address(v, args[1]); err != nil {
		return e, err
	}
	e.Size = u.size
	if u.format == 's' {
		e.Size = 0
	}
	e.Format = string(u.format)
	at, named := e.Addr, true
	for i := range u.count {
		unit, next, err := examine(v, u, at)
		if err != nil {
			if len(e.Values) == 0 {
				return e, err
			}
			e.doubt(err)
			break
		}
		if named && i%e.perLine() == 0 {
			f, err := v.Locate(at)
			if named = err == nil; named {
				unit.Symbol = within(f)
			}
		}
		e.Values = append(e.Values, unit)
		at = next
	}
	return e, nil
}

// examine reads one unit and returns the address behind it.
func examine(v *kernel.View, u unitFormat, at kernel.VirtAddr) (Unit, kernel.VirtAddr, error) {
	unit := Unit{Addr: at}
	if u.format == 's' {
		const most = 4096
		b := make([]byte, 0, 64)
		for len(b) < most {
			part := make([]byte, 64-int(at+kernel.VirtAddr(len(b)))&63) // never beyond the page of what was asked for
			if err := v.ReadVirt(at+kernel.VirtAddr(len(b)), part); err != nil {
				return unit, at, err
			}
			b = append(b, part...)
			if i := strings.IndexByte(string(b), 0); i >= 0 {
				unit.Text = strconv.Quote(string(b[:i]))
				return unit, at + kernel.VirtAddr(i) + 1, nil
			}
		}
		unit.Text = strconv.Quote(string(b)) + "..."
		return unit, at + kernel.VirtAddr(len(b)), nil
	}
	var b [8]byte
	if err := v.ReadVirt(at, b[:u.size]); err != nil {
		return unit, at, err
	}
	n := binary.LittleEndian.Uint64(b[:])
	bits := 8 * u.size
	signed := int64(n<<(64-bits)) >> (64 - bits)
	switch u.format {
	case 'x':
		unit.Text = fmt.Sprintf("0x%0*x", 2*u.size, n)
	case 'd':
		unit.Text = strconv.FormatInt(signed, 10)
	case 'u':
		unit.Text = strconv.FormatUint(n, 10)
	case 'o':
		unit.Text = fmt.Sprintf("0%o", n)
	case 't':
		unit.Text = fmt.Sprintf("%0*b", bits, n)
	case 'c':
		unit.Text = fmt.Sprintf("%d %s", signed, strconv.QuoteRune(rune(n&0xff)))
	case 'a':
		unit.Text = fmt.Sprintf("0x%016x", n)
		if f, err := v.Locate(kernel.VirtAddr(n)); err == nil {
			unit.Text += " <" + within(f) + ">"
		}
	}
	return unit, at + kernel.VirtAddr(u.size), nil
}

// Text prints lines as gdb's x does.
func (e Examined) Text(w io.Writer) error {
	p := &printer{w: w}
	for i, x := range e.Values {
		if i%e.perLine() == 0 {
			if i > 0 {
				p.printf("\n")
			}
			p.printf("%v", x.Addr)
			if x.Symbol != "" {
				p.printf(" <%s>", x.Symbol)
			}
			p.printf(":")
		}
		p.printf("  %s", Clean(x.Text))
	}
	p.printf("\n")
	p.extent(e.Extent)
	return p.err
}

// perLine is how many units the text has in a line.
func (e Examined) perLine() int {
	switch {
	case e.Size == 0 || e.Format == "a":
		return 1
	case e.Format == "t":
		return max(1, 4/e.Size)
	}
	return min(16/e.Size, 8)
}
