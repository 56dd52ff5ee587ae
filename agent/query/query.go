// Package query answers the questions that people ask of a host, once for the command line, Redfish and remote monitors.
//
// Listings is the table of those that are about one of the kernel's subsystems each: the command line makes verbs of it,
// Redfish resources.
//
// An answer is a plain struct: it marshals to JSON, and its Text method prints it for people. The answers say how far
// they can be trusted: a walk that broke off is not Complete and names its Doubts, and what the host changed while it was
// read lowers the Confidence. What comes from the host (names of
// processes, its log) is kept as it was read in JSON, and is escaped by Clean in every Text, so that a host cannot send
// control sequences to the terminal of whoever examines it.
package query

import (
	"context"
	"iter"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// View is what the questions need of a kernel. *kernel.View has it.
type View interface {
	Tasks() iter.Seq2[kernel.Task, error]
	Heartbeat() (kernel.Heartbeat, error)
	Panic() (kernel.PanicState, error)
	Log() iter.Seq2[kernel.LogRecord, error]
	// Confidence is the evidence for all that was answered so far.
	Confidence() kernel.Confidence
}

var _ View = (*kernel.View)(nil)

// maxDoubts bounds the list of reasons in an answer: a hostile host could produce one for every task.
const maxDoubts = 16

// doubts collects why an answer is not the whole truth, at most maxDoubts of them.
type doubts []string

func (d *doubts) add(why string) {
	if len(*d) < maxDoubts {
		*d = append(*d, why)
	}
}

// canceled reports the context's error as a doubt and tells whether to stop.
func (d *doubts) canceled(ctx context.Context) bool {
	if err := ctx.Err(); err != nil {
		d.add("stopped: " + err.Error())
		return true
	}
	return false
}
