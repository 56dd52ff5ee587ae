package roce

// ring is a queue of at most limit entries that grows to it as needed and then stays.
type ring[T any] struct {
	entries []T
	head    int
	n       int
	limit   int
}

func (r *ring[T]) init(limit int) { r.limit = limit }

func (r *ring[T]) full() bool { return r.n == r.limit }

// at returns the i-th entry from the oldest on. Precondition: 0 <= i < n.
func (r *ring[T]) at(i int) *T {
	if i += r.head; i >= len(r.entries) {
		i -= len(r.entries)
	}
	return &r.entries[i]
}

// push adds an entry at the end. Precondition: not full.
func (r *ring[T]) push(v T) {
	if r.n == len(r.entries) {
		grown := make([]T, max(min(max(2*r.n, 8), r.limit), r.n+1))
		for i := range r.n {
			grown[i] = *r.at(i)
		}
		r.entries, r.head = grown, 0
	}
	r.n++
	*r.at(r.n - 1) = v
}

// pop takes away the oldest entry. Precondition: n > 0.
func (r *ring[T]) pop() T {
	v := *r.at(0)
	clear(r.entries[r.head : r.head+1])
	if r.head++; r.head == len(r.entries) {
		r.head = 0
	}
	r.n--
	return v
}

// remove takes away the i-th entry from the oldest on. Precondition: 0 <= i < n.
func (r *ring[T]) remove(i int) {
	for ; i > 0; i-- {
		*r.at(i) = *r.at(i - 1)
	}
	r.pop()
}
