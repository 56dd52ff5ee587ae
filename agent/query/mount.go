package query

import (
	"context"
	"io"
	"iter"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Mounts is the answer to "what is mounted?".
type Mounts struct {
	Extent
	Mounts []kernel.Mount `json:"mounts"`
}

// AskMounts lists the mounts as process 1 has them, or the one that the argument names.
func AskMounts(ctx context.Context, v *kernel.View, args []string) (Mounts, error) {
	pid, err := process(args, 1)
	if err != nil {
		return Mounts{}, err
	}
	return mounts(ctx, v.Mounts(pid))
}

func mounts(ctx context.Context, seq iter.Seq2[kernel.Mount, error]) (m Mounts, err error) {
	m.Mounts, err = gather(ctx, &m.Extent, seq)
	return m, err
}

// Text prints lines like mount(8)'s.
func (m Mounts) Text(w io.Writer) error {
	p := &printer{w: w}
	for _, x := range m.Mounts {
		p.printf("%s on %s type %s (%s)", Clean(x.Source), Clean(x.Path), Clean(x.FS), x.Options)
		if x.Root != "/" {
			p.printf(" [%s]", Clean(x.Root))
		}
		if x.Super == "ro" && x.Options[:2] == "rw" {
			p.printf(" of a read-only file system")
		}
		p.printf("\n")
	}
	p.extent(m.Extent)
	return p.err
}
