package query

import (
	"cmp"
	"context"
	"io"
	"iter"
	"slices"
	"strconv"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// SlabCaches is the answer to "what does the kernel use its memory for?", the largest cache first.
type SlabCaches struct {
	Extent
	Bytes  uint64             `json:"bytes"` // of all
	Caches []kernel.SlabCache `json:"caches"`
}

// AskSlabCaches lists the slab caches.
func AskSlabCaches(ctx context.Context, v *kernel.View, _ []string) (SlabCaches, error) {
	return slabCaches(ctx, v.SlabCaches())
}

func slabCaches(ctx context.Context, seq iter.Seq2[kernel.SlabCache, error]) (s SlabCaches, err error) {
	s.Caches, err = gather(ctx, &s.Extent, seq)
	slices.SortStableFunc(s.Caches, func(a, b kernel.SlabCache) int { return cmp.Compare(b.Bytes, a.Bytes) })
	for _, c := range s.Caches {
		s.Bytes += c.Bytes
	}
	return s, err
}

// Text prints a table like slabtop(1)'s.
func (s SlabCaches) Text(w io.Writer) error {
	p := &printer{w: w}
	p.printf("%s in %d slab caches\n\n", Bytes(s.Bytes), len(s.Caches))
	rows := [][]string{{"BYTES", "OBJECTS", "SIZE", "SLABS", "NAME"}}
	for _, c := range s.Caches {
		rows = append(rows, []string{Bytes(c.Bytes), strconv.FormatUint(c.Objects, 10), strconv.FormatUint(c.Size, 10), strconv.FormatUint(c.Slabs, 10), Clean(c.Name)})
	}
	p.table(">>>><", rows)
	p.extent(s.Extent)
	return p.err
}
