package kernel

import (
	"fmt"
	"time"
)

// Host is what a kernel says of itself as a whole.
type Host struct {
	CommandLine string        `json:"commandLine"`
	Tainted     uint64        `json:"tainted"` // TAINT_… bits; see Taint
	Boot        time.Time     `json:"boot"`
	Now         time.Time     `json:"now"`    // its clock
	Uptime      time.Duration `json:"uptime"` // CLOCK_MONOTONIC
	TicksPerSec uint64        `json:"ticksPerSec"`
	LSMs        []string      `json:"lsms"` // active security modules
	Swaps       []Swap        `json:"swaps"`
}

// Swap is a swap area (struct swap_info_struct, include/linux/swap.h), in bytes.
type Swap struct {
	Path     string `json:"path"`
	Size     uint64 `json:"size"`
	Used     uint64 `json:"used"`
	Priority int    `json:"priority"`
}

const (
	maxCommandLine = 4096
	swpUsed        = 1 // SWP_USED
	maxSwaps       = 64
)

// Host reads what the kernel says of itself.
func (v *View) Host() (Host, error) {
	h, err := settle(v, v.host)
	if err != nil {
		return h, fmt.Errorf("read host: %w", err)
	}
	return h, nil
}

func (v *View) host() (Host, error) {
	var h Host
	r := resolver{img: v.img}
	line, taint := r.symbol("saved_command_line"), r.symbol("tainted_mask")
	if r.err != nil {
		return h, r.err
	}
	p, err := v.pointer("saved_command_line", line)
	if err != nil {
		return h, err
	}
	if h.CommandLine, err = v.cstring("saved_command_line", p, maxCommandLine); err != nil {
		return h, err
	}
	if h.Tainted, err = v.Uint64(taint); err != nil {
		return h, err
	}
	t, err := v.img.times(v)
	if err != nil {
		return h, err
	}
	h.Boot, h.Now, h.Uptime = time.Unix(0, t.boot).UTC(), time.Unix(0, t.real).UTC(), time.Duration(t.mono)
	if _, h.TicksPerSec, err = v.jiffies(); err != nil {
		return h, err
	}
	if h.LSMs, err = v.LSMs(); err != nil && !tolerable(err) {
		return h, err
	}
	h.Swaps, err = v.swaps()
	return h, err
}

func (v *View) swaps() ([]Swap, error) {
	all := []Swap{}
	areas, ok, err := v.feature("swap_info")
	if !ok {
		return all, err
	}
	r := resolver{img: v.img}
	count := r.symbol("nr_swapfiles")
	s := r.shape("swap_info_struct", "flags", "prio", "pages", "inuse_pages.counter|inuse_pages", "swap_file")
	if r.err != nil {
		return nil, r.err
	}
	n, err := v.Uint32(count)
	if err != nil {
		return nil, err
	}
	if n > maxSwaps {
		return nil, &CorruptError{"nr_swapfiles", count, fmt.Sprintf("is %d", n)}
	}
	list, err := v.pointers("swap_info", areas, int(n))
	if err != nil {
		return nil, err
	}
	files := fileWalk{v: v}
	if err := files.resolve(); err != nil {
		return nil, err
	}
	for _, at := range list {
		if at == 0 {
			continue
		}
		t, err := v.thing(s, at)
		if err != nil {
			return nil, err
		}
		if t.num("flags")&swpUsed == 0 || t.ptr("swap_file") == 0 {
			continue
		}
		files.all = files.all[:0]
		if err := files.open(OpenFile{}, "", t.ptr("swap_file")); err != nil {
			return nil, err
		}
		// The highest bit says that the area is off the list of those with room (SWAP_USAGE_OFFLIST_BIT).
		used := t.num("inuse_pages.counter") << 2 >> 2
		all = append(all, Swap{Path: files.all[0].Path, Size: t.num("pages") & 0xffffffff * v.img.pageSize, Used: used * v.img.pageSize, Priority: int(int16(t.num("prio")))})
	}
	return all, nil
}
