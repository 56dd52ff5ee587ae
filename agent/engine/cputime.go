package engine

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// processorTime returns how much processor time f takes, which unlike the time that passes is f's own: not that of others who have the
// processor meanwhile. What f has other goroutines do is not in it.
func processorTime(f func()) time.Duration {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	began := threadTime()
	f()
	return threadTime() - began
}

// threadTime is what clock_gettime(2) says of the processor time of the thread that calls; zero if it does not.
func threadTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		return 0
	}
	return time.Duration(t.Nano())
}
