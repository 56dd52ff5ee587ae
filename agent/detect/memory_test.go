package detect

import (
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

func TestMemoryErrorsDetector(t *testing.T) {
	// samples makes a day of samples of one controller with two modules, of which f says what is counted.
	samples := func(since time.Duration, f func(at time.Duration, c *kernel.MemoryController)) *Pass {
		p := &Pass{}
		t0 := time.Unix(1_800_000_000, 0)
		for at := time.Duration(0); at <= MemoryKept; at += MemoryApart {
			c := kernel.MemoryController{Name: "ie31200", Since: since + at, Modules: []kernel.ECCCounter{{Index: 0, Label: "DIMM_A1"}, {Index: 3}}}
			f(at, &c)
			p.Now = t0.Add(at)
			p.Memory = append(p.Memory, MemorySample{At: p.Now, Controllers: []kernel.MemoryController{c}})
		}
		return p
	}
	const year = 365 * 24 * time.Hour
	for _, tt := range []struct {
		name  string
		since time.Duration
		f     func(at time.Duration, c *kernel.MemoryController)
		key   string // of the finding
		s     Severity
	}{
		{"nothing", year, func(time.Duration, *kernel.MemoryController) {}, "", ""},
		{"many, all of them long ago", year, func(_ time.Duration, c *kernel.MemoryController) { c.Modules[0].Correctable = 1000 }, "", ""},
		{"one an hour", year, func(at time.Duration, c *kernel.MemoryController) {
			c.Modules[1].Correctable = 1000 + uint64(at/time.Hour)
		}, "mc0/dimm3", Warning},
		{"nine in the day", year, func(at time.Duration, c *kernel.MemoryController) {
			c.Modules[1].Correctable = 9 * uint64(at) / uint64(MemoryKept)
		}, "", ""},
		{"ten since a start of this morning", -MemoryKept + time.Minute, func(_ time.Duration, c *kernel.MemoryController) { c.Modules[0].Correctable = 10 }, "mc0/dimm0", Warning},
		{"set to zero by somebody, and as many again", year, func(at time.Duration, c *kernel.MemoryController) {
			if c.Modules[0].Correctable = 1000; at > MemoryKept/2 {
				c.Modules[0].Correctable = uint64(at-MemoryKept/2) / uint64(MemoryApart)
			}
		}, "mc0/dimm0", Warning},
		{"one that could not be corrected", year, func(_ time.Duration, c *kernel.MemoryController) { c.Modules[1].Uncorrectable = 1 }, "mc0/dimm3", Critical},
		{"somewhere", year, func(_ time.Duration, c *kernel.MemoryController) { c.UncorrectableUnplaced = 2 }, "mc0", Critical},
	} {
		fs := detect(t, memoryErrors(DefaultConfig()), samples(tt.since, tt.f))
		switch {
		case tt.key == "" && len(fs) > 0:
			t.Errorf("%s: %+v", tt.name, fs)
		case tt.key != "" && (len(fs) != 1 || fs[0].Key != tt.key || fs[0].Severity != tt.s):
			t.Errorf("%s: %+v; want %s of %s", tt.name, fs, tt.s, tt.key)
		}
	}
}
