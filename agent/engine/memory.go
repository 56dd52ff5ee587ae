package engine

import (
	"errors"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// ErrNoMemory means that the path to the host's memory is not open now.
var ErrNoMemory = errors.New("the path to the host's memory is not open")

// shown is the host's memory as HostMemory gives it out.
type shown struct {
	mem    hostmem.Memory
	of     target
	narrow hostmem.Memory
}

// HostMemory returns the path to the host's memory as it is at this moment, for others to read: within what the attached kernel
// calls RAM, and then known is true, else within the map of the path alone. The engine closes it when the path is lost, and opens
// another: ask again for each use. Whoever stores through it does so through a hostmem.Guard, with WritesOn and under the agreement.
func (e *Engine) HostMemory() (mem hostmem.Memory, known bool, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.mem == nil {
		return nil, false, ErrNoMemory
	}
	var img *kernel.Image
	if e.target != nil {
		img = e.target.image()
	}
	if img == nil {
		return e.mem, false, nil
	}
	if s := &e.shown; s.mem != e.mem || s.of != e.target {
		*s = shown{e.mem, e.target, hostmem.Narrow(e.mem, img.RAM())}
	}
	return e.shown.narrow, true, nil
}

// Grant returns what the access agreement permits on the host that is there now.
func (e *Engine) Grant() access.Grant {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.grant()
}

// WritesOn returns nil unless this agent was started to watch only.
func (e *Engine) WritesOn() error {
	if !e.o.Writes {
		return ErrWritesOff
	}
	return nil
}

// Heartbeat returns the latest heartbeat of the host; the zero value if there was none since the attach.
func (e *Engine) Heartbeat() kernel.Heartbeat {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.beat
}
