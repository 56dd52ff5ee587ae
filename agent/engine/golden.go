package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

const (
	// All of the kernel's code and constants are compared once in goldenRound, its tables of functions once in hotRound.
	goldenRound = 25 * time.Second
	hotRound    = 600 * time.Millisecond
	// It is taken a little after the attach: an agent that starts has more urgent things to do.
	goldenAfter = 5 * time.Second
	// A copy that could not be taken is tried again, for the kernel may have been starting.
	goldenAgain = 2 * time.Second
	// A pass that comes late makes up for so many heartbeats, no more: comparing must not make the next one later still.
	goldenCatchUp = 5
	// goldenPatience is how long the comparison may fail before the host's code counts as not looked at.
	goldenPatience = 5 * time.Second
)

// golden has the kernel's code and constants compared with what they were when they were first seen.
type golden struct {
	g      *kernel.Golden
	file   *os.File         // its bytes; has no name, and ends with the agent
	taking chan takenGolden // nil if none is being taken
	stop   context.CancelFunc
	next   time.Time // when one may be taken
	never  bool      // this kernel's cannot be
	taken  time.Time
	built  bool      // it is of the kernel as it was built
	swept  time.Time // when it was last compared with
	round  time.Time // when the latest round was complete; zero before the first
	failed time.Time // since when it cannot be compared with; zero while it can
}

type takenGolden struct {
	g     *kernel.Golden
	file  *os.File
	built bool
	err   error
}

// end forgets the copy, when the kernel that it is of is gone or its memory is to be closed.
func (k *golden) end() {
	if k.taking != nil {
		k.stop()
		t := <-k.taking // it reads no more from the memory
		if t.file != nil {
			t.file.Close()
		}
	}
	if k.file != nil {
		k.file.Close()
	}
	*k = golden{}
}

// take has a copy taken in the background; the bytes are kept on disk, in a directory, if one is given. find, if not nil, has
// kernels as they were built.
func (k *golden) take(ctx context.Context, img *kernel.Image, dir string, find func(id string) (*kernel.Known, error), log *slog.Logger) {
	ctx, k.stop = context.WithTimeout(ctx, openTimeout)
	taking := make(chan takenGolden, 1)
	k.taking = taking
	go func() {
		var t takenGolden
		defer func() {
			if r := recover(); r != nil {
				t.err = fmt.Errorf("panic while the golden copy is taken: %v", r)
			}
			taking <- t
		}()
		var keep kernel.GoldenStore
		if dir != "" {
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.err = err
				return
			}
			if t.file, t.err = os.CreateTemp(dir, "golden-*"); t.err != nil {
				return
			}
			os.Remove(t.file.Name()) // it is of no use to another start
			keep = t.file
		}
		var known *kernel.Known
		if find != nil {
			var err error
			if known, err = find(img.Info().BuildID); err != nil {
				log.Error("the kernel as it was built is of no use: the host is trusted as it is now", "err", err)
			}
		}
		if known != nil {
			defer known.Close()
			t.built = true
		}
		t.g, t.err = kernel.TakeGolden(ctx, img, keep, known)
	}()
}

// compare looks at what is next and returns what is not as it was, and why that is not known any more. It does nothing, and returns nothing,
// until there is a copy.
func (w *watcher) compare(v *kernel.View, now time.Time) ([]kernel.Change, string) {
	k := &w.golden
	img := w.t.image()
	if v == nil || img == nil || k.never {
		return nil, ""
	}
	if k.g == nil {
		if k.taking == nil {
			if !now.Before(k.next) {
				k.take(w.root, img, w.e.o.CacheDir, w.e.o.Known, w.e.log)
			}
			return nil, ""
		}
		var t takenGolden
		select {
		case t = <-k.taking:
		default:
			return nil, ""
		}
		k.stop()
		k.taking = nil
		if t.err != nil {
			if t.file != nil {
				t.file.Close()
			}
			k.next = now.Add(goldenAgain)
			if !errors.Is(t.err, kernel.ErrNotYet) {
				k.never = errors.Is(t.err, kernel.ErrNotSupported) || errors.Is(t.err, kernel.ErrNotFound)
				w.e.log.Warn("changes of the kernel's code are not looked for", "err", t.err, "again", !k.never)
			}
			return nil, ""
		}
		k.g, k.file, k.taken, k.built = t.g, t.file, now, t.built
	}
	rounds := k.g.Rounds()
	total, hot := k.g.Bytes()
	late := min(max(now.Sub(k.swept), w.e.config.Heartbeat), goldenCatchUp*w.e.config.Heartbeat)
	share := func(n uint64, in time.Duration) uint64 { return n*uint64(late)/uint64(in) + 1 }
	k.swept = now
	err := k.g.Sweep(v, share(total, goldenRound), share(hot, hotRound))
	if k.g.Rounds() > rounds {
		k.round = now
	}
	s := &GoldenState{
		Taken: k.taken, Bytes: total, Hot: hot, Rounds: k.g.Rounds(), Kept: k.file != nil, Built: k.built,
		Round: k.round, Compared: k.g.Compared(), Differing: k.g.Differing(), Modules: k.g.Modules(), Left: k.g.Left(),
	}
	why := k.tell(err, now)
	if !k.failed.IsZero() {
		s.Error, s.Failing = err.Error(), k.failed
	}
	w.e.mu.Lock()
	w.e.compared = s
	if why != "" {
		w.e.note("compare the kernel's code", err)
	}
	w.e.mu.Unlock()
	return k.g.Changes(v), why
}

// tell takes in how a comparison has ended, and says why it is not known whether the kernel's code is as it was; empty if it is known.
func (k *golden) tell(err error, now time.Time) string {
	switch {
	case err == nil:
		k.failed = time.Time{}
	case k.failed.IsZero():
		k.failed = now
	case now.Sub(k.failed) > goldenPatience:
		return fmt.Sprintf("the kernel's code has not been compared since %s: %v", k.failed.UTC().Format(time.TimeOnly), err)
	}
	return ""
}
