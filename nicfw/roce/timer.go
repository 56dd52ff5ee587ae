package roce

import "time"

// timer is one entry of a timerHeap; its owner embeds it.
type timer struct {
	at    time.Duration // when the heap will give it out; not later than want
	want  time.Duration // when it is due; 0 is never
	index int           // in the heap, plus one; 0 is not there
	owner interface{ expire(now time.Duration) }
}

// timerHeap gives out timers when they are due. A timer that moves back, as one does with each packet, stays where it
// is in the heap and is put right when it comes up: the common case costs two stores.
type timerHeap []*timer

// set moves t to at, or takes it away if at is 0.
func (h *timerHeap) set(t *timer, at time.Duration) {
	t.want = at
	switch {
	case at == 0 || t.index != 0 && t.at <= at:
		return
	case t.index == 0:
		*h = append(*h, t)
		t.index = len(*h)
	}
	t.at = at
	h.up(t.index - 1)
}

// remove takes t out, so that the heap no longer refers to it.
func (h *timerHeap) remove(t *timer) {
	if t.index == 0 {
		return
	}
	i, last := t.index-1, len(*h)-1
	h.swap(i, last)
	(*h)[last] = nil
	*h = (*h)[:last]
	t.index, t.want = 0, 0
	if i < last {
		h.up(i)
		h.down(i)
	}
}

// next returns when the first timer may be due, or 0 if there is none. It may be too early, never too late.
func (h *timerHeap) next() time.Duration {
	for len(*h) > 0 {
		t := (*h)[0]
		if t.want == t.at {
			return t.at
		}
		h.pop()
		if t.want != 0 {
			h.set(t, t.want)
		}
	}
	return 0
}

// due takes out a timer that is due at now, or returns nil.
func (h *timerHeap) due(now time.Duration) *timer {
	if at := h.next(); at == 0 || at > now {
		return nil
	}
	t := h.pop()
	t.want = 0
	return t
}

func (h *timerHeap) pop() *timer {
	t, want := (*h)[0], (*h)[0].want
	h.remove(t)
	t.want = want
	return t
}

func (h timerHeap) swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i+1, j+1
}

func (h timerHeap) up(i int) {
	for i > 0 {
		parent := (i - 1) / 2
		if h[parent].at <= h[i].at {
			return
		}
		h.swap(i, parent)
		i = parent
	}
}

func (h timerHeap) down(i int) {
	for {
		child := 2*i + 1
		if child >= len(h) {
			return
		}
		if child+1 < len(h) && h[child+1].at < h[child].at {
			child++
		}
		if h[i].at <= h[child].at {
			return
		}
		h.swap(i, child)
		i = child
	}
}
