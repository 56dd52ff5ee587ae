package engine

import (
	"errors"
	"log/slog"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestThread has the watch run before others while it wants to, and nobody else.
func TestThread(t *testing.T) {
	nice := func() int { // of the calling thread; the system call, unlike the C library, says 20 less that
		n, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
		if err != nil {
			t.Fatal(err)
		}
		return 20 - n
	}
	done := make(chan error, 1)
	var all, watching, searching int
	var used, slept time.Duration
	go func() { // the thread ends with it
		var w thread
		if w.used() != 0 {
			t.Error("a thread that is not its own has a processor time")
		}
		w.begin(slog.New(slog.DiscardHandler))
		all = nice()
		if !w.may {
			done <- errors.New("precedence takes CAP_SYS_NICE")
			return
		}
		w.prefer(true)
		watching = nice()
		before, began := w.used(), time.Now()
		w.sleep(t.Context(), 20*time.Millisecond)
		slept, used = time.Since(began), w.used()-before
		w.prefer(false)
		searching = nice()
		done <- nil
	}()
	if err := <-done; err != nil {
		t.Skip(err)
	}
	if all != 0 || watching != watchNice || searching != 0 {
		t.Errorf("nice values: %d at first, %d while it watches, %d while it searches", all, watching, searching)
	}
	if slept < 20*time.Millisecond || used <= 0 || used > slept/2 {
		t.Errorf("it slept for %v, and used %v of a processor for that", slept, used)
	}
	if n := nice(); n == watchNice {
		t.Error("another thread has its precedence")
	}
}
