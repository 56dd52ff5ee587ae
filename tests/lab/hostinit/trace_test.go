package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// From a host with Linux 6.1, shortened.
const sample = `# tracer: nop
#
# entries-in-buffer/entries-written: 6/6   #P:2
#
#                                _-----=> irqs-off/BH-disabled
#           TASK-PID     CPU#  |||||     TIMESTAMP  FUNCTION
#              | |         |   |||||        |         |
       kworker/u4:0-9       [001] .....    12.000100: e0: (do_exit+0x0/0xb00)
           my - sh-127     [000] d.h1.    12.000200: e1: (hrtimer_wakeup+0x0/0x30)
           my - sh-127     [000] d.h2.    12.000210: e1: (hrtimer_wakeup+0x0/0x30)
           my - sh-127     [000] d.h2.    12.000215: x1: (__hrtimer_run_queues+0x10f/0x2b0 <- hrtimer_wakeup)
           my - sh-127     [000] d.h1.    12.000250: x1: (__hrtimer_run_queues+0x10f/0x2b0 <- hrtimer_wakeup)
            <...>-128     [001] d.h1.    13.999999: x1: (__hrtimer_run_queues+0x10f/0x2b0 <- hrtimer_wakeup)
            <...>-128     [001] d.h1.    13.999999: e7: (none+0x0/0x30)
`

func TestCount(t *testing.T) {
	hits, total, err := count(strings.NewReader(sample), 2)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]int{1, 2}, hits); diff != "" {
		t.Errorf("hits (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]time.Duration{0, 55 * time.Microsecond}, total); diff != "" {
		t.Errorf("total (-want +got):\n%s", diff)
	}
}

func FuzzCount(f *testing.F) {
	f.Add([]byte(sample), 2)
	f.Add([]byte("-1 [0] . 99999999999.000000: e0: "), 1)
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		n = n & 0xff
		hits, total, err := count(bytes.NewReader(b), n)
		if err == nil && (len(hits) != n || len(total) != n) {
			t.Errorf("count = %d hits, %d totals; want %d", len(hits), len(total), n)
		}
	})
}

func TestService(t *testing.T) {
	s := &store{boot: "id", values: make(map[string]string)}
	for _, c := range []struct{ line, want string }{
		{"HELLO", "id 1"}, {"GET a", "-"}, {"SET a 5", "OK"}, {"INCR a", "6"}, {"GET a", "6"}, {"INCR b", "1"},
		{"hello there", "3 hello there"}, {"", "3 "}, {"SET a", "3 SET a"}, {"HELLO", "id 10"},
	} {
		if got := s.answer(3, c.line); got != c.want {
			t.Errorf("answer(%q) = %q; want %q", c.line, got, c.want)
		}
	}
}
