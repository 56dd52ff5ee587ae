package kernel

import (
	"errors"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// testProcessors compares the processors with /proc/cpuinfo.
func testProcessors(t *testing.T, g *guest, img *Image) {
	g.t = t
	got, err := img.View(t.Context()).Processors()
	if img.Info().Arch != "x86_64" { // there is no cpuinfo_x86
		if !errors.Is(err, ErrNotSupported) {
			t.Errorf("Processors = %+v, %v; want ErrNotSupported", got, err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	var cpuinfo string
	g.ask(&cpuinfo, "cpuinfo")
	var want []Processor
	for block := range strings.SplitSeq(strings.TrimSpace(cpuinfo), "\n\n") {
		values := map[string]string{}
		for line := range strings.Lines(block) {
			name, value, _ := strings.Cut(line, ":")
			values[strings.TrimSpace(name)] = strings.TrimSpace(value)
		}
		number := func(name string) int {
			n, err := strconv.Atoi(values[name])
			if err != nil {
				t.Fatalf("/proc/cpuinfo: %s: %v", name, err)
			}
			return n
		}
		p := Processor{
			Socket: number("physical id"), Vendor: values["vendor_id"], Model: values["model name"], Family: number("cpu family"),
			Number: number("model"), Cores: number("cpu cores"), Threads: number("siblings"),
		}
		if !slices.Contains(want, p) {
			want = append(want, p)
		}
	}
	if !slices.Equal(got, want) || len(got) == 0 {
		t.Errorf("Processors = %+v; /proc/cpuinfo has %+v", got, want)
	}
}
