// bench measures nicfw/roce against its peers, the peer and ours in turn in one run, and prints the ratios of medians.
//
// Synopsis:
//
//	go run ./tests/rxe/bench [-n ROUNDS] [-only local|guests|verbs]
//
// Description:
//
// On this machine (local): READs between two processes over loopback, against one TCP stream of iperf3 and against
// requests over TCP. Between virtual machines (guests): Debian's perftest on the kernel's rxe, reading from our engine
// that runs natively on this machine or in a guest, against reading from rxe in a guest; all at the ports of one virtual
// switch, which takes root. In one guest (verbs): perftest reading memory that package uverbs has the kernel's verbs
// device serve, against rdma-core's own server.
//
// Between virtual machines, both sides have the same wire and the same settings: a tap device with segmentation offload for each
// guest and this machine's own port at one bridge, an MTU of 4300 and so a path MTU of 4096, the same client guest, one CPU and
// Debian's kernel for each guest, up to 16 READs outstanding at ours and as many as rxe announces at rxe. All guests run all
// the time; the servers wait while it is not their turn.
//
// Rounds alternate, so that neighbours on the machine disturb both sides alike; the numbers themselves mean little on a
// machine that is not quiet.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/tests/rxe"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// row is one line of the table.
type row struct {
	what, unit string
	ours, peer float64 // medians
	bound      float64 // of the ratio; 0: reported only
	atMost     bool    // the bound is an upper one
	paired     float64 // the median of ratios of neighbouring measurements, where there are such
}

func (r row) ratio() float64 {
	if r.paired != 0 {
		return r.paired
	}
	return r.ours / r.peer
}

func (r row) met() string {
	switch {
	case r.bound == 0:
		return ""
	case r.atMost && r.ratio() <= r.bound, !r.atMost && r.ratio() >= r.bound:
		return "yes"
	}
	return "NO"
}

func run(ctx context.Context, args []string, w io.Writer) error {
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	n := fs.Int("n", 5, "rounds")
	only := fs.String("only", "", "one of local, guests, verbs")
	verbose := fs.Bool("v", false, "show the guests' consoles")
	if err := fs.Parse(args); err != nil {
		return err
	}
	b := bench{n: *n, console: io.Discard}
	if *verbose {
		b.console = os.Stderr
	}
	dir, err := os.MkdirTemp("", "rxe-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if b.peer, err = rxe.BuildPeer(dir); err != nil {
		return err
	}
	for _, part := range []struct {
		name string
		run  func(context.Context) error
	}{{"local", b.local}, {"verbs", b.verbs}, {"guests", b.guests}} {
		if *only == "" || *only == part.name {
			if err := part.run(ctx); err != nil {
				return fmt.Errorf("%s: %w", part.name, err)
			}
		}
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "what\tpeer\tours\tratio\tmust be\tmet")
	for _, r := range b.rows {
		must := ""
		if r.bound != 0 {
			must = fmt.Sprintf(">= %.2f", r.bound)
			if r.atMost {
				must = fmt.Sprintf("<= %.2f", r.bound)
			}
		}
		fmt.Fprintf(t, "%s\t%.4g %s\t%.4g %s\t%.2f\t%s\t%s\n", r.what, r.peer, r.unit, r.ours, r.unit, r.ratio(), must, r.met())
	}
	return t.Flush()
}

// bench collects the table.
type bench struct {
	n       int
	peer    string // rxepeer
	console io.Writer
	rows    []row
}

// local runs the package's own benchmarks, which alternate, and takes the medians that they report.
func (b *bench) local(ctx context.Context) error {
	if _, err := exec.LookPath("iperf3"); err != nil {
		return fmt.Errorf("%w: install what images/debian-packages.txt lists, or run make setup", err)
	}
	c := exec.CommandContext(ctx, "go", "test", "-run", "^TestAllocations$", "-bench", "Throughput|WithoutICRC|Latency|Scatter", "-benchtime", fmt.Sprintf("%dx", b.n), "-count=1",
		"github.com/backdoor-rhs/backdoor/nicfw/roce")
	var out bytes.Buffer
	c.Stdout, c.Stderr = io.MultiWriter(&out, b.console), os.Stderr
	if err := c.Run(); err != nil {
		return fmt.Errorf("%w\n%s", err, &out)
	}
	m := map[string]float64{}
	for l := range strings.Lines(out.String()) {
		if f := strings.Fields(l); len(f) > 2 && strings.HasPrefix(f[0], "Benchmark") {
			for i := 2; i+1 < len(f); i += 2 {
				if v, err := strconv.ParseFloat(f[i], 64); err == nil {
					m[f[i+1]] = v
				}
			}
		}
	}
	b.rows = append(b.rows,
		row{"64 KiB READ / one TCP stream of iperf3, loopback", "GB/s", m["read-GB/s"], m["iperf3-GB/s"], 1.0, false, m["read/iperf3"]},
		row{"8 B READ p50, busy poll / TCP request and response, each where it is faster: on one CPU or on one each", "µs", m["busy-p50-µs"], m["tcp-p50-µs"], 0.6, true, m["busy/tcp"]},
		row{"8 B READ p50, blocking / TCP request and response, likewise", "µs", m["sleeping-p50-µs"], m["tcp-p50-µs"], 0.8, true, m["sleeping/tcp"]},
		row{"64 KiB READ, ICRC on / off, a CPU each", "GB/s", m["own-cpu-read-GB/s"], m["own-cpu-read-no-icrc-GB/s"], 0.8, false, m["own-cpu-icrc-on/off"]},
		row{"64 KiB READ, ICRC on / off, wherever the scheduler puts them", "GB/s", m["read-GB/s"], m["read-no-icrc-GB/s"], 0, false, m["icrc-on/off"]},
		row{"1000 random pages of 4 KiB, at once / one at a time, a CPU each", "pages/ms", 1e3 / m["µs/page"], 1e3 / (m["µs/page"] * m["one-by-one/at-once"]), 8, false, m["one-by-one/at-once"]})
	return nil
}

// rounds runs the servers' clients in turn in a guest's script.
const rounds = `
client() { # test server port arguments
	t=$1; s=$2; p=$3; shift 3
	n=0
	while ! ib_$t -F -p $p "$@" $s >/out 2>&1 && [ $n -lt 25 ]; do sleep 0.2; n=$((n+1)); done
	echo "mark $t $s $p"
	grep -v '^ *#' /out | tail -3
}
`

// servers is a script that serves perftest clients: bandwidth on port 18516, latency on port 18517.
const servers = `
(while :; do ib_read_bw -F -p 18516 >/dev/null 2>&1; done) &
(while :; do ib_read_lat -F -p 18517 >/dev/null 2>&1; done) &
`

// results takes what a guest said: by test, server and port, the average bandwidth in MB/s or the typical latency in µs.
func results(console string) map[string][]float64 {
	got, mark := map[string][]float64{}, ""
	for l := range strings.Lines(console) {
		if _, m, ok := strings.Cut(strings.TrimSpace(l), "mark "); ok {
			mark = m
			continue
		}
		f := strings.Fields(l)
		if len(f) < 5 || mark == "" {
			continue
		}
		column := 3 // #bytes #iterations BW peak, BW average, message rate
		if strings.HasPrefix(mark, "read_lat") {
			column = 4 // #bytes #iterations t_min, t_max, t_typical
		}
		_, err1 := strconv.Atoi(f[0])
		_, err2 := strconv.Atoi(f[1])
		v, err3 := strconv.ParseFloat(f[column], 64)
		if errors.Join(err1, err2, err3) == nil {
			got[mark] = append(got[mark], v)
			mark = ""
		}
	}
	return got
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// paired returns the median of the ratios of what was measured one right after the other, or 0 if some are missing, for then
// nobody knows which belong together.
func paired(a, b []float64) float64 {
	if len(a) != len(b) {
		return 0
	}
	r := make([]float64, len(a))
	for i := range r {
		r[i] = a[i] / b[i]
	}
	return median(r)
}

// verbs compares uverbs with rdma-core in one guest.
func (b *bench) verbs(ctx context.Context) error {
	ctx, stop := context.WithTimeout(ctx, 10*time.Minute)
	defer stop()
	const addr = "10.79.0.2"
	var out bytes.Buffer
	g := rxe.Guest{Kernel: "6.1-generic", Addr: netip.MustParsePrefix(addr + "/24"), Programs: map[string]string{"rxepeer": b.peer},
		Script: rounds + servers + fmt.Sprintf(`
rxepeer -uverbs -addr %[1]s -size 1048576 2>/dev/null &
i=0
while [ $i -lt %[2]d ]; do
	for j in 1 2 3; do
		client read_bw %[1]s 18515 -s 65536 -n 400
		client read_bw %[1]s 18516 -s 65536 -n 400
	done
	client read_lat %[1]s 18515 -s 8 -n 1000
	client read_lat %[1]s 18517 -s 8 -n 1000
	i=$((i+1))
done
`, addr, b.n)}
	if err := g.Run(ctx, io.MultiWriter(&out, b.console)); err != nil {
		return err
	}
	r := results(out.String())
	for _, k := range []string{"read_bw 10.79.0.2 18515", "read_bw 10.79.0.2 18516", "read_lat 10.79.0.2 18515", "read_lat 10.79.0.2 18517"} {
		if len(r[k]) < (b.n+1)/2 {
			return fmt.Errorf("%d of %d rounds of %s\n%s", len(r[k]), b.n, k, &out)
		}
	}
	ourBW, coreBW := r["read_bw "+addr+" 18515"], r["read_bw "+addr+" 18516"]
	b.rows = append(b.rows,
		row{"pure-Go uverbs / rdma-core, one guest, ib_read_bw 64 KiB", "MB/s", median(ourBW), median(coreBW), 0.95, false, paired(ourBW, coreBW)},
		row{"pure-Go uverbs / rdma-core, one guest, ib_read_lat 8 B", "µs", median(r["read_lat "+addr+" 18515"]), median(r["read_lat "+addr+" 18517"]), 0, true, 0})
	return nil
}

// guests compares our engine, natively and in a guest, with rxe in a guest.
func (b *bench) guests(ctx context.Context) error {
	ctx, stop := context.WithTimeout(ctx, 10*time.Minute)
	defer stop()
	const native, client, soft, ours, busy = "10.79.0.1", "10.79.0.2", "10.79.0.3", "10.79.0.4", "10.79.0.5"
	prefix := func(a string) netip.Prefix { return netip.MustParsePrefix(a + "/24") }
	n, err := rxe.NewNetwork(prefix(native), prefix(busy))
	if errors.Is(err, unix.EPERM) {
		fmt.Fprintln(os.Stderr, "bench: a network between this machine and guests takes root: guests are left out")
		return nil
	} else if err != nil {
		return err
	}
	defer n.Close()
	for _, args := range [][]string{{"-addr", native}, {"-addr", busy, "-spin", "300us"}} {
		server := exec.CommandContext(ctx, b.peer, append(args, "-size", "1048576")...)
		server.Stderr = b.console
		if err := n.Do(server.Start); err != nil {
			return err
		}
		defer server.Wait()
		defer server.Process.Kill()
	}
	serving, halt := context.WithCancel(ctx)
	var others sync.WaitGroup
	defer others.Wait()
	defer halt()
	programs := map[string]string{"rxepeer": b.peer}
	for _, g := range []rxe.Guest{
		{Kernel: "6.1-generic", Addr: prefix(soft), Net: n, Script: servers + "sleep 600"},
		{Kernel: "6.1-generic", Addr: prefix(ours), Net: n, Programs: programs, Plain: true, Script: "rxepeer -addr " + ours + " -size 1048576 2>/dev/null"},
	} {
		others.Go(func() { g.Run(serving, io.Discard) })
	}
	var out bytes.Buffer
	g := rxe.Guest{Kernel: "6.1-generic", Addr: prefix(client), Net: n, Script: rounds + fmt.Sprintf(`
i=0
while [ $i -lt %[4]d ]; do
	for j in 1 2 3; do
		client read_bw %[1]s 18515 -s 65536 -n 500
		client read_bw %[2]s 18516 -s 65536 -n 500
	done
	client read_bw %[3]s 18515 -s 65536 -n 500
	client read_lat %[1]s 18515 -s 8 -n 1000
	client read_lat %[2]s 18517 -s 8 -n 1000
	client read_lat %[5]s 18515 -s 8 -n 1000
	client read_lat %[3]s 18515 -s 8 -n 1000
	i=$((i+1))
done
`, native, soft, ours, b.n, busy)}
	if err := g.Run(ctx, io.MultiWriter(&out, b.console)); err != nil {
		return fmt.Errorf("%w\n%s", err, &out)
	}
	r := results(out.String())
	for _, k := range []string{"read_bw " + native + " 18515", "read_bw " + soft + " 18516", "read_lat " + native + " 18515", "read_lat " + soft + " 18517", "read_lat " + busy + " 18515"} {
		if len(r[k]) < (b.n+1)/2 {
			return fmt.Errorf("%d of %d rounds of %s\n%s", len(r[k]), b.n, k, &out)
		}
	}
	softBW, nativeBW, softLat := r["read_bw "+soft+" 18516"], r["read_bw "+native+" 18515"], r["read_lat "+soft+" 18517"]
	// Busy polling takes a CPU, which is the guests' where there are few: the way that is faster here counts.
	nativeLat, other := r["read_lat "+native+" 18515"], r["read_lat "+busy+" 18515"]
	way, otherWay := "blocking", "busy poll"
	if median(other) < median(nativeLat) {
		nativeLat, other, way, otherWay = other, nativeLat, otherWay, way
	}
	bw, lat := median(softBW), median(softLat)
	b.rows = append(b.rows,
		row{"rxe guest reads ours, native / rxe guest, ib_read_bw 64 KiB", "MB/s", median(nativeBW), bw, 1.0, false, paired(nativeBW, softBW)},
		row{"rxe guest reads ours, native, " + way + " / rxe guest, ib_read_lat 8 B", "µs", median(nativeLat), lat, 0.5, true, paired(nativeLat, softLat)},
		row{"rxe guest reads ours, native, " + otherWay + " / rxe guest, ib_read_lat 8 B", "µs", median(other), lat, 0, true, paired(other, softLat)},
		row{"rxe guest reads ours, in a guest / rxe guest, ib_read_bw 64 KiB", "MB/s", median(r["read_bw "+ours+" 18515"]), bw, 0, false, 0},
		row{"rxe guest reads ours, in a guest / rxe guest, ib_read_lat 8 B", "µs", median(r["read_lat "+ours+" 18515"]), lat, 0, true, 0})
	return nil
}
