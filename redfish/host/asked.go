package host

import (
	"context"
	"sync"
	"time"
)

// asked remembers the answer to a question that is put over a network or to the host's memory. One question is under way at a
// time, and whoever asks meanwhile waits for its answer or, if there is one that is not too old, takes that.
type asked[T any] struct {
	mu     sync.Mutex // guards what follows
	value  T
	at     time.Time
	asking chan struct{} // closed when the answer has come; nil if nobody is being asked
	epoch  int           // counts forget: an answer to an older question is not kept
}

// forget drops the answer, because something was done that changes it.
func (a *asked[T]) forget() {
	a.mu.Lock()
	defer a.mu.Unlock()
	var none T
	a.value, a.at, a.asking = none, time.Time{}, nil
	a.epoch++
}

// get returns an answer. One younger than fresh is taken without asking again; one younger than stale is taken as well, but the
// next caller gets a newer one. ask must end by itself. If ctx ends first the zero value is returned.
func (a *asked[T]) get(ctx context.Context, now func() time.Time, fresh, stale time.Duration, ask func() T) T {
	for {
		a.mu.Lock()
		age := now().Sub(a.at)
		if !a.at.IsZero() && age < fresh {
			defer a.mu.Unlock()
			return a.value
		}
		if a.asking == nil {
			a.asking = make(chan struct{})
			go a.put(ask, now, a.asking, a.epoch)
		}
		asking, value, epoch := a.asking, a.value, a.epoch
		known := !a.at.IsZero() && age < stale
		a.mu.Unlock()
		if known {
			return value
		}
		select {
		case <-asking:
		case <-ctx.Done():
			var none T
			return none
		}
		a.mu.Lock()
		if a.epoch == epoch {
			defer a.mu.Unlock()
			return a.value
		}
		a.mu.Unlock() // what was asked is of before something was done: ask again
	}
}

// last returns the latest answer, however old.
func (a *asked[T]) last() T {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.value
}

// put asks, and keeps the answer unless it has been forgotten meanwhile.
func (a *asked[T]) put(ask func() T, now func() time.Time, done chan struct{}, epoch int) {
	v := ask()
	a.mu.Lock()
	defer a.mu.Unlock()
	defer close(done)
	if a.epoch != epoch {
		return
	}
	a.asking, a.at, a.value = nil, now(), v
}
