package engine

import (
	"context"
	"log/slog"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// watchNice is how nice the thread of the watch is while a kernel is watched: it takes a twentieth of a CPU and is not to wait for all that is served
// beside it, for a fault is found when it looks.
const watchNice = -10

// thread is one that the watch has for itself, if it begins it.
type thread struct {
	own      bool
	may, has bool // precedence
}

// begin gives the calling goroutine a thread of its own, which ends with it. Who may not have precedence (that takes CAP_SYS_NICE) watches as all others run.
func (t *thread) begin(log *slog.Logger) {
	runtime.LockOSThread()
	t.own = true
	if err := setNice(watchNice); err != nil {
		log.Warn("the watch waits for what else this process does, and may see a panic late: run it as root, or with CAP_SYS_NICE", "err", err)
		return
	}
	t.may = setNice(0) == nil
}

// prefer takes precedence, or leaves it to others: a search of all memory can take seconds.
func (t *thread) prefer(want bool) {
	if !t.may || t.has == want {
		return
	}
	nice := 0
	if want {
		nice = watchNice
	}
	if setNice(nice) == nil {
		t.has = want
	}
}

// setNice sets it for the calling thread: for Linux, that is what a process of PRIO_PROCESS is (setpriority(2), NOTES).
func setNice(n int) error { return unix.Setpriority(unix.PRIO_PROCESS, 0, n) }

// sleep sleeps at most so long. With precedence the thread sleeps in the kernel and not by a timer of Go's, which another thread, without precedence,
// would have to hear first.
func (t *thread) sleep(ctx context.Context, d time.Duration) {
	if !t.has {
		sleep(ctx, d)
		return
	}
	s := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&s, nil) // a signal ends it early, which does no harm
}

// used is how much processor time the thread has had, which unlike the time that passes is its own (clock_gettime(2)); zero if it is not the watch's or
// cannot be told. What the watch has other goroutines do is not in it.
func (t *thread) used() time.Duration {
	var s unix.Timespec
	if !t.own {
		return 0
	}
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &s); err != nil {
		return 0
	}
	return time.Duration(s.Nano())
}
