package query

import (
	"context"
	"fmt"
	"io"
	"iter"
	"strconv"
	"strings"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Locks is the answer to "who waits for whom?".
type Locks struct {
	Extent
	Locks []kernel.Lock `json:"locks"`
	// Deadlocks are the circles of threads that wait for each other, by PID.
	Deadlocks [][]int `json:"deadlocks"`
}

// AskLocks lists the locks that tasks wait for. Tasks that wait for each other do so for ever: a deadlock counts only if a second
// look finds it, too.
func AskLocks(ctx context.Context, v *kernel.View, _ []string) (Locks, error) {
	l, err := locks(ctx, v.Locks())
	if err != nil || len(l.Deadlocks) == 0 {
		return l, err
	}
	return locks(ctx, v.Image().View(ctx).Locks())
}

func locks(ctx context.Context, seq iter.Seq2[kernel.Lock, error]) (l Locks, err error) {
	if l.Locks, err = gather(ctx, &l.Extent, seq); err != nil {
		return l, err
	}
	if l.Deadlocks = kernel.Deadlocks(l.Locks); l.Deadlocks == nil {
		l.Deadlocks = [][]int{}
	}
	return l, nil
}

// Ill tells whether tasks wait for each other.
func (l Locks) Ill() bool { return len(l.Deadlocks) > 0 }

// Text prints each lock with who holds it and who waits for it, then the deadlocks.
func (l Locks) Text(w io.Writer) error {
	p := &printer{w: w}
	who := func(t kernel.LockTask) string { return fmt.Sprintf("%d %s (%s)", t.PID, Clean(t.Comm), Clean(t.State)) }
	rows := [][]string{{"LOCK", "KIND", "NAME", "HELD BY", "WAITING"}}
	for _, x := range l.Locks {
		held := "-"
		switch {
		case x.Readers > 0 && x.Owner != nil:
			held = fmt.Sprintf("%d readers, last %s", x.Readers, who(*x.Owner))
		case x.Readers > 0:
			held = fmt.Sprintf("%d readers", x.Readers)
		case x.Owner != nil:
			held = who(*x.Owner)
		case x.Leaked:
			held = "a task that has ended"
		}
		first := ""
		if len(x.Waiters) > 0 {
			first = waiting(x.Waiters[0], who)
		}
		rows = append(rows, []string{x.Addr.String(), x.Kind, Clean(x.Name), held, first})
		for i := 1; i < len(x.Waiters); i++ {
			rows = append(rows, []string{"", "", "", "", waiting(x.Waiters[i], who)})
		}
	}
	p.table("<<<<<", rows)
	for _, circle := range l.Deadlocks {
		var pids []string
		for _, pid := range append(circle[:len(circle):len(circle)], circle[0]) {
			pids = append(pids, strconv.Itoa(pid))
		}
		p.printf("DEADLOCK: %s\n", strings.Join(pids, " waits for "))
	}
	p.extent(l.Extent)
	return p.err
}

func waiting(w kernel.LockWaiter, who func(kernel.LockTask) string) string {
	if w.Reads {
		return who(w.LockTask) + " to read"
	}
	return who(w.LockTask)
}
