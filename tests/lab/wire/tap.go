package wire

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"
)

// maxTapped bounds what a Tap keeps.
const maxTapped = 1 << 16

// Tap sees every frame that enters the switch, until it is closed. It is safe for concurrent use.
type Tap struct {
	s *Switch

	mu     sync.Mutex
	frames [][]byte      // guarded by mu
	times  []time.Time   // guarded by mu; when each frame of frames came
	news   chan struct{} // guarded by mu; closed and replaced with each frame
}

// Tap listens to the wire from now on.
func (s *Switch) Tap() (*Tap, error) {
	t := &Tap{s: s, news: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed
	}
	s.taps[t] = true
	return t, nil
}

func (t *Tap) see(frame []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.frames) < maxTapped {
		t.frames, t.times = append(t.frames, frame), append(t.times, time.Now())
	}
	close(t.news)
	t.news = make(chan struct{})
}

// Frames returns what was seen so far. The frames must not be changed.
func (t *Tap) Frames() [][]byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([][]byte(nil), t.frames...)
}

// Times returns when the frames that Frames returns came.
func (t *Tap) Times() []time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]time.Time(nil), t.times...)
}

// Wait returns the first frame that is as asked for, as soon as it was seen.
func (t *Tap) Wait(ctx context.Context, ok func([]byte) bool) ([]byte, error) {
	seen := 0
	for {
		t.mu.Lock()
		frames, news := t.frames, t.news
		t.mu.Unlock()
		for ; seen < len(frames); seen++ {
			if ok(frames[seen]) {
				return frames[seen], nil
			}
		}
		select {
		case <-news:
		case <-ctx.Done():
			return nil, fmt.Errorf("wire: tap: %w", context.Cause(ctx))
		}
	}
}

// Close ends it; what was seen stays.
func (t *Tap) Close() error {
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	if !t.s.taps[t] {
		return fmt.Errorf("wire: close tap: %w", net.ErrClosed)
	}
	delete(t.s.taps, t)
	return nil
}
