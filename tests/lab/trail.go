package lab

import (
	"context"
	"sync"
)

// trail is a growing list that readers can wait on. It keeps the newest entries; positions count all entries ever.
type trail[T any] struct {
	limit int

	mu      sync.Mutex
	items   []T           // guarded by mu
	first   int           // guarded by mu; position of items[0]
	changed chan struct{} // guarded by mu; closed and replaced when items grows
}

func newTrail[T any](limit int) *trail[T] {
	return &trail[T]{limit: limit, changed: make(chan struct{})}
}

func (t *trail[T]) add(items ...T) {
	if len(items) == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.items = append(t.items, items...)
	if over := len(t.items) - t.limit; over > 0 {
		t.items = append([]T(nil), t.items[over:]...)
		t.first += over
	}
	close(t.changed)
	t.changed = make(chan struct{})
}

// mark is the position behind the last entry: a place to wait from.
func (t *trail[T]) mark() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.first + len(t.items)
}

// since returns the kept entries from mark on.
func (t *trail[T]) since(mark int) []T {
	items, _, _ := t.look(mark)
	return items
}

// look returns the kept entries from mark on, the position behind them, and a channel that closes when there are more.
func (t *trail[T]) look(mark int) (items []T, next int, changed <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	next = t.first + len(t.items)
	if from := max(mark-t.first, 0); from < len(t.items) {
		items = append([]T(nil), t.items[from:]...)
	}
	return items, next, t.changed
}

// wait returns the first entry from mark on that matches, as soon as it is there.
func (t *trail[T]) wait(ctx context.Context, mark int, match func(T) bool) (T, error) {
	for {
		items, next, changed := t.look(mark)
		for _, it := range items {
			if match(it) {
				return it, nil
			}
		}
		mark = next
		select {
		case <-changed:
		case <-ctx.Done():
			var zero T
			return zero, context.Cause(ctx)
		}
	}
}
