package query

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Attach tells how the kernel of a host was found and proven, rung by rung, or how far that came.
type Attach struct {
	Kernel *kernel.Info  `json:"kernel,omitempty"` // nil if none was attached
	Rungs  []kernel.Rung `json:"rungs"`
	Error  string        `json:"error,omitempty"`
	// Phase is what an agent does that is attached to none.
	Phase string `json:"phase,omitempty"`
}

// AttachOf tells of an attach that has worked (info), or not (err).
func AttachOf(info *kernel.Info, err error) Attach {
	a := Attach{Kernel: info, Rungs: []kernel.Rung{}}
	if info != nil && info.Rungs != nil {
		a.Rungs = info.Rungs
	}
	var failed *kernel.AttachError
	if errors.As(err, &failed) && failed.Rungs != nil {
		a.Rungs = failed.Rungs
	}
	if err != nil {
		a.Error = err.Error()
	}
	return a
}

// Text prints a line for each rung.
func (a Attach) Text(w io.Writer) error {
	p := &printer{w: w}
	if k := a.Kernel; k != nil {
		p.printf("Linux %s %s, build ID %s, boot %s\n", Clean(k.Release), Clean(k.Arch), Clean(k.BuildID), Clean(k.BootID))
	}
	var rows [][]string
	var total time.Duration
	for _, r := range a.Rungs {
		mark := "proven"
		if !r.OK {
			mark = "NO"
		}
		total += r.Duration
		rows = append(rows, []string{Clean(r.Name), mark, fmt.Sprint(r.Duration.Round(10 * time.Microsecond)), Clean(r.Detail)})
	}
	p.table("<<><", rows)
	if len(rows) > 0 {
		p.printf("%v in all\n", total.Round(10*time.Microsecond))
	}
	if a.Phase != "" {
		p.printf("the agent is in phase %s\n", Clean(a.Phase))
	}
	if a.Error != "" {
		p.printf("not attached: %s\n", Clean(a.Error))
	}
	return p.err
}
