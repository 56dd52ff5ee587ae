package query

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Stack is the answer to "where does it sleep?".
type Stack struct {
	Extent
	Stack kernel.Stack `json:"stack"`
}

// AskStack unwinds the kernel stack of the thread that the argument names.
func AskStack(_ context.Context, v *kernel.View, args []string) (Stack, error) {
	pid, err := process(args, 0)
	if err != nil {
		return Stack{}, err
	}
	s := Stack{Extent: Extent{At: time.Now(), Complete: true}}
	if s.Stack, err = v.Stack(pid); err != nil {
		return Stack{}, err
	}
	if !s.Stack.Complete {
		s.Complete, s.Doubts = false, []string{s.Stack.Why + "; frames with a ? are guessed"}
	}
	return s, nil
}

// Text prints lines like /proc/PID/stack's.
func (s Stack) Text(w io.Writer) error {
	p := &printer{w: w}
	p.printf("%d %s (%s)\n", s.Stack.PID, Clean(s.Stack.Comm), s.Stack.State)
	for _, f := range s.Stack.Frames {
		mark := " "
		if f.Guessed {
			mark = "?"
		}
		p.printf("%s %s\n", mark, place(f))
	}
	e := s.Extent
	e.Complete = true // of the frames is said above which are guessed
	p.extent(e)
	return p.err
}

func place(f kernel.Frame) string {
	return fmt.Sprintf("%#016x  ", uint64(f.Addr)) + within(f)
}

// within names the function or variable that a frame's address is in.
func within(f kernel.Frame) (s string) {
	if f.Symbol != "" {
		s += fmt.Sprintf("%s+%#x", Clean(f.Symbol), f.Offset)
	}
	if f.Module != "" {
		s += " [" + Clean(f.Module) + "]"
	}
	return s
}

// Symbol is the answer to "what is there?" and to "where is it?".
type Symbol struct {
	Extent
	kernel.Frame
}

// AskSymbol finds the symbol of the name, or at the address, that the argument is.
func AskSymbol(_ context.Context, v *kernel.View, args []string) (Symbol, error) {
	s := Symbol{Extent: Extent{At: time.Now(), Complete: true}}
	va, err := address(v, args[0])
	if err != nil {
		return s, err
	}
	s.Frame, err = v.Locate(va)
	return s, err
}

// address takes a number with its 0x prefix, or a symbol of the kernel; either with +OFFSET.
func address(v *kernel.View, arg string) (kernel.VirtAddr, error) {
	name, offset, _ := strings.Cut(arg, "+")
	var plus uint64
	if offset != "" {
		n, err := strconv.ParseUint(offset, 0, 64)
		if err != nil {
			return 0, &ArgumentError{arg, "an address or a symbol"}
		}
		plus = n
	}
	if strings.HasPrefix(name, "0x") {
		n, err := strconv.ParseUint(name, 0, 64)
		if err != nil {
			return 0, &ArgumentError{arg, "an address or a symbol"}
		}
		return kernel.VirtAddr(n + plus), nil
	}
	va, err := v.Image().Symbol(name)
	return va + kernel.VirtAddr(plus), err
}

// Text prints the address and the symbol in one line.
func (s Symbol) Text(w io.Writer) error {
	p := &printer{w: w}
	p.printf("%s\n", place(s.Frame))
	return p.err
}

// Object is the answer to "what is in that structure?".
type Object struct {
	Extent
	Addr  kernel.VirtAddr `json:"addr"`
	Value kernel.Value    `json:"value"`
}

// AskObject reads the object of the type and at the address that the arguments name.
func AskObject(_ context.Context, v *kernel.View, args []string) (Object, error) {
	o := Object{Extent: Extent{At: time.Now(), Complete: true}}
	va, err := address(v, args[1])
	if err != nil {
		return o, err
	}
	o.Addr = va
	o.Value, err = v.Print(args[0], va)
	return o, err
}

// Text prints the object in the style of C, with the offset of each member.
func (o Object) Text(w io.Writer) error {
	p := &printer{w: w}
	p.value(o.Value, 0)
	return p.err
}

func (p *printer) value(v kernel.Value, depth int) {
	label := v.Type
	if v.Name != "" {
		label += " " + v.Name
	}
	p.printf("%6d  %s%s", v.Offset, strings.Repeat("    ", depth), Clean(label))
	if v.Text != "" {
		p.printf(" = %s", Clean(v.Text))
	}
	if len(v.Parts) == 0 {
		p.printf("\n")
		return
	}
	p.printf(" {\n")
	for _, part := range v.Parts {
		p.value(part, depth+1)
	}
	p.printf("        %s}\n", strings.Repeat("    ", depth))
}
