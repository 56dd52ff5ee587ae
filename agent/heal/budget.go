package heal

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

// ErrBlast means that a repair would do more to the host than may be done for one incident without an operator.
var ErrBlast = errors.New("it is more than policy allows for one incident")

// Budget bounds what all repairs of one incident together may do to a host: how many processes they may be about, and how many
// bytes they may store. It is safe for concurrent use.
type Budget struct {
	tasks, bytes int

	mu     sync.Mutex
	met    map[victimID]bool // guarded by mu
	stored int               // guarded by mu
}

type victimID struct {
	tgid  int
	start time.Duration
}

// NewBudget returns a budget of which nothing is used.
func NewBudget(tasks, bytes int) *Budget {
	return &Budget{tasks: tasks, bytes: bytes, met: make(map[victimID]bool)}
}

// take books the most that a plan may do, or nothing if that is too much. What only takes back what was done is free.
func (b *Budget) take(p Plan) error {
	if b == nil || len(p.Lifts) > 0 {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	all := p.Targets
	if p.Target != nil {
		all = append(all[:len(all):len(all)], *p.Target)
	}
	fresh := make(map[victimID]bool)
	for _, t := range all {
		if id := (victimID{t.TGID, t.Start}); !b.met[id] {
			fresh[id] = true
		}
	}
	bytes := 0
	for _, s := range p.Steps {
		bytes += len(s.Put)
	}
	switch {
	case len(b.met)+len(fresh) > b.tasks:
		return fmt.Errorf("%d processes more, beside %d; %d are allowed: %w", len(fresh), len(b.met), b.tasks, ErrBlast)
	case b.stored+bytes > b.bytes:
		return fmt.Errorf("%d bytes more, beside %d; %d are allowed: %w", bytes, b.stored, b.bytes, ErrBlast)
	}
	for id := range fresh {
		b.met[id] = true
	}
	b.stored += bytes
	return nil
}
