//go:build linux

package roce

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// flat is memory as a mapped RAM file is: bytes that are copied.
type flat []byte

func (f flat) ReadAt(p []byte, off int64) (int, error) {
	if n := copy(p, f[off:]); n < len(p) {
		return n, io.ErrUnexpectedEOF
	}
	return len(p), nil
}

func (f flat) WriteAt(p []byte, off int64) (int, error) { return copy(f[off:], p), nil }

// target is a queue pair that reaches memory in another process, and a TCP service there.
type target struct {
	q    *QP
	va   uint64
	rkey RKey
	tcp  string
}

// offer is what the serving process says about itself, and invitation what it is told, each a line of JSON.
type offer struct {
	Addr netip.Addr
	QPN  QPN
	PSN  PSN
	RKey RKey
	TCP  string
}

type invitation struct {
	Remote
	Size      int
	NoOffload bool
	Spin      time.Duration
	NoICRC    bool
	CPU       int // to run on, counted from one; 0: any
}

// pin lets all threads of this process run on one CPU, or with -1 on any again.
func pin(t testing.TB, cpu int) {
	t.Helper()
	var set unix.CPUSet
	if cpu >= 0 {
		set.Set(cpu)
	} else {
		set.Fill()
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		if tid, err := strconv.Atoi(task.Name()); err == nil {
			if err := unix.SchedSetaffinity(tid, &set); err != nil && err != unix.ESRCH { // a thread may have ended
				t.Fatal(err)
			}
		}
	}
}

// TestServe is no test: it is the process that benchmarks read from, which they start with its name and this variable.
func TestServe(t *testing.T) {
	if os.Getenv("ROCE_BENCH_SERVE") == "" {
		t.Skip("serves benchmarks, which start it themselves")
	}
	var in invitation
	stdin := json.NewDecoder(os.Stdin)
	if err := stdin.Decode(&in); err != nil {
		t.Fatal(err)
	}
	if in.CPU > 0 {
		pin(t, in.CPU-1)
	}
	link, _ := udpPair(t, UDPConfig{NoOffload: in.NoOffload, Spin: in.Spin})
	link.(*udpLink).rx.off, link.(*udpLink).tx.off = in.NoICRC, in.NoICRC
	d, err := Open(link, Config{})
	if err != nil {
		t.Fatal(err)
	}
	d.tx.noSums = in.NoICRC
	pd := d.NewPD()
	mr, err := pd.Register(make(flat, in.Size), MRConfig{Length: uint64(in.Size), Access: AccessRead | AccessWrite})
	if err != nil {
		t.Fatal(err)
	}
	q, err := d.NewQP(pd, nil, QPConfig{})
	if err != nil {
		t.Fatal(err)
	}
	if err := q.Connect(in.Remote); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go tcpServe(c)
		}
	}()
	json.NewEncoder(os.Stdout).Encode(offer{link.LocalAddr().Addr(), q.QPN(), q.PSN(), mr.RKey(), l.Addr().String()})
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		stdin.Decode(&in) // until the benchmark ends
		stop()
	}()
	d.Run(ctx)
}

// benchTarget starts a process that serves size bytes and connects to it.
func benchTarget(b testing.TB, cfg UDPConfig, size int, icrc bool) target {
	b.Helper()
	return newTarget(b, cfg, invitation{Size: size, NoICRC: !icrc})
}

// newTarget starts a process that serves as in says and connects to it.
func newTarget(b testing.TB, cfg UDPConfig, in invitation) target {
	b.Helper()
	link, spare := udpPair(b, cfg)
	spare.Close()
	link.(*udpLink).rx.off, link.(*udpLink).tx.off = in.NoICRC, in.NoICRC
	d, err := Open(link, Config{})
	if err != nil {
		b.Fatal(err)
	}
	d.tx.noSums = in.NoICRC
	q, err := d.NewQP(d.NewPD(), d.NewCQ(), QPConfig{AckTimeout: time.Second}) // nothing gets lost, but the machine may be busy
	if err != nil {
		b.Fatal(err)
	}
	server := exec.Command(os.Args[0], "-test.run=^TestServe$")
	server.Env = append(os.Environ(), "ROCE_BENCH_SERVE=1")
	server.Stderr = os.Stderr
	stdin, err := server.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	stdout, err := server.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := server.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		stdin.Close()
		server.Wait()
		d.Close()
	})
	var of offer
	in.Remote, in.NoOffload, in.Spin = Remote{link.LocalAddr().Addr(), q.QPN(), q.PSN()}, cfg.NoOffload, cfg.Spin
	if err := errors.Join(json.NewEncoder(stdin).Encode(in), json.NewDecoder(stdout).Decode(&of)); err != nil {
		b.Fatal(err)
	}
	if err := q.Connect(Remote{of.Addr, of.QPN, of.PSN}); err != nil {
		b.Fatal(err)
	}
	return target{q, 0, of.RKey, of.TCP}
}

// read keeps depth READs of size bytes under way until total bytes were read.
func (t target) read(b testing.TB, total, size, depth int) {
	done := make([]Completion, depth)
	bufs := make([][]byte, depth)
	for i := range bufs {
		bufs[i] = make([]byte, size)
	}
	left, out := total/size, 0
	post := func(i int) {
		if left > 0 {
			left--
			out++
			if _, err := t.q.Post(WorkRequest{ID: uint64(i), Verb: VerbRead, Buf: bufs[i], RKey: t.rkey}); err != nil {
				b.Fatal(err)
			}
		}
	}
	for i := range depth {
		post(i)
	}
	for out > 0 {
		n, err := t.q.cq.Wait(context.Background(), done)
		if err != nil {
			b.Fatal(err)
		}
		for _, c := range done[:n] {
			if c.Err != nil {
				b.Fatal(c.Err)
			}
			out--
			post(int(c.ID))
		}
	}
}

// write does the same with WRITEs.
func (t target) write(b testing.TB, total, size int) {
	wrs, out := make([]WorkRequest, total/size), make([]Completion, total/size)
	buf := make([]byte, size)
	for i := range wrs {
		wrs[i] = WorkRequest{Verb: VerbWrite, Buf: buf, RKey: t.rkey}
	}
	if err := t.q.Do(context.Background(), wrs, out); err != nil {
		b.Fatal(err)
	}
}

// tcpServe answers each request of 16 bytes: so many bytes, so many times.
func tcpServe(c net.Conn) {
	defer c.Close()
	req, buf := make([]byte, 16), make([]byte, 128<<10)
	for {
		if _, err := io.ReadFull(c, req); err != nil {
			return
		}
		size, times := binary.LittleEndian.Uint64(req), binary.LittleEndian.Uint64(req[8:])
		for range times {
			if _, err := c.Write(buf[:size]); err != nil {
				return
			}
		}
	}
}

// tcpClient is a connection to tcpServe.
func (t target) tcpClient(b testing.TB) net.Conn {
	c, err := net.Dial("tcp", t.tcp)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	return c
}

func tcpRequest(size, times int) []byte {
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, uint64(size)), uint64(times))
}

// tcpStream receives total bytes that are sent in blocks as iperf3 uses them.
func tcpStream(b testing.TB, c net.Conn, total int) {
	c.Write(tcpRequest(128<<10, total/(128<<10)))
	buf := make([]byte, 128<<10)
	for n := 0; n < total; {
		k, err := c.Read(buf)
		if err != nil {
			b.Fatal(err)
		}
		n += k
	}
}

// tcpRead does what target.read does by request and response over TCP.
func tcpRead(b testing.TB, c net.Conn, total, size, depth int) {
	req, buf := tcpRequest(size, 1), make([]byte, size)
	for range depth {
		c.Write(req)
	}
	for n := total / size; n > 0; n-- {
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
		if n > depth {
			c.Write(req)
		}
	}
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// paired returns the median of the ratios of what was measured one right after the other: what else goes on in the machine
// changes more slowly than that.
func paired(a, b []float64) float64 {
	var r []float64
	for i := range min(len(a), len(b)) {
		r = append(r, a[i]/b[i])
	}
	return median(r)
}

// iperf3 returns the GB/s of one TCP stream of that program that carries so many bytes.
func iperf3(b testing.TB, bytes int) float64 {
	server := exec.Command("iperf3", "-s", "-1", "-p", "5202")
	if err := server.Start(); err != nil {
		b.Fatal(err)
	}
	defer server.Wait()
	time.Sleep(200 * time.Millisecond) // there is no other sign that it listens
	report, err := exec.Command("iperf3", "-c", "127.0.0.1", "-p", "5202", "-n", strconv.Itoa(bytes), "-J").Output()
	if err != nil {
		server.Process.Kill()
		b.Fatal(err)
	}
	var r struct {
		End struct {
			Received struct {
				Bits float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	if err := json.Unmarshal(report, &r); err != nil {
		b.Fatal(err)
	}
	return r.End.Received.Bits / 8e9
}

// BenchmarkThroughput reads 64 KiB at a time, 16 at once, with and without the ICRC, against one TCP stream of ours and,
// if it is installed, of iperf3, and against pipelined requests over TCP, in turn in one run. It reports GB/s and the
// medians of the ratios of neighbouring measurements.
func BenchmarkThroughput(b *testing.B) {
	const total, size, depth = 256 << 20, 64 << 10, 16
	with := benchTarget(b, UDPConfig{}, size, true)
	without := benchTarget(b, UDPConfig{}, size, false)
	single := benchTarget(b, UDPConfig{NoOffload: true}, size, true)
	stream, request := with.tcpClient(b), with.tcpClient(b)
	kinds := []struct {
		name string
		run  func()
		got  []float64
	}{
		{"read", func() { with.read(b, total, size, depth) }, nil},
		{"read-no-icrc", func() { without.read(b, total, size, depth) }, nil},
		{"read-no-offload", func() { single.read(b, total, size, depth) }, nil},
		{"write", func() { with.write(b, total, size) }, nil},
		{"read-4KiB", func() { with.read(b, total/4, 4096, 64) }, nil},
		{"tcp-stream", func() { tcpStream(b, stream, total) }, nil},
		{"tcp-request", func() { tcpRead(b, request, total, size, depth) }, nil},
	}
	for i := range kinds { // warm up
		kinds[i].run()
	}
	var iperf []float64
	_, err := exec.LookPath("iperf3")
	for b.Loop() {
		if err == nil {
			iperf = append(iperf, iperf3(b, total))
		}
		for i := range kinds {
			k := &kinds[i]
			bytes := float64(total)
			if k.name == "read-4KiB" {
				bytes /= 4
			}
			start := time.Now()
			k.run()
			k.got = append(k.got, bytes/time.Since(start).Seconds()/1e9)
		}
	}
	if len(iperf) > 0 {
		b.ReportMetric(paired(kinds[0].got, iperf), "read/iperf3")
		b.ReportMetric(median(iperf), "iperf3-GB/s")
	}
	b.ReportMetric(paired(kinds[0].got, kinds[5].got), "read/tcp-stream")
	b.ReportMetric(paired(kinds[0].got, kinds[6].got), "read/tcp-request")
	b.ReportMetric(paired(kinds[0].got, kinds[1].got), "icrc-on/off")
	for _, k := range kinds {
		b.ReportMetric(median(k.got), k.name+"-GB/s")
	}
	b.ReportMetric(0, "ns/op")
}

// BenchmarkWithoutICRC reads 64 KiB at a time, 16 at once, with and without the ICRC, in turn in many short slices. Client and
// server have a CPU each, where there are two, as machines of their own would: where the scheduler puts them makes a greater
// difference than the ICRC. It reports GB/s and the median of the ratios of neighbouring slices.
func BenchmarkWithoutICRC(b *testing.B) {
	const total, size, depth, turns = 64 << 20, 64 << 10, 16, 10
	pin(b, 0)
	defer pin(b, -1)
	in := invitation{Size: size, CPU: min(runtime.NumCPU(), 2)}
	targets := [2]target{newTarget(b, UDPConfig{}, in)}
	in.NoICRC = true
	targets[1] = newTarget(b, UDPConfig{}, in)
	var got [2][]float64
	for _, t := range targets { // warm up
		t.read(b, total, size, depth)
	}
	for b.Loop() {
		for range turns {
			for i, t := range targets {
				start := time.Now()
				t.read(b, total, size, depth)
				got[i] = append(got[i], total/time.Since(start).Seconds()/1e9)
			}
		}
	}
	b.ReportMetric(paired(got[0], got[1]), "own-cpu-icrc-on/off")
	b.ReportMetric(median(got[0]), "own-cpu-read-GB/s")
	b.ReportMetric(median(got[1]), "own-cpu-read-no-icrc-GB/s")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkLatency reads 8 bytes at a time, sleeping and busy polling, against request and response over TCP, in turn in
// one run. Where client and server run decides as much as what they do: on one CPU a switch between them is cheap, on one
// each a sleeper's CPU has to be woken, and who polls needs one of its own. So each is measured both ways, and compared in
// its better one with TCP in its better one. It reports medians and the 99th percentile in µs, and the medians of the ratios of
// medians of short slices.
func BenchmarkLatency(b *testing.B) {
	const turns, rounds = 20, 250
	ctx := context.Background()
	read := func(t target) func() {
		buf := make([]byte, 8)
		return func() {
			if err := t.q.Read(ctx, buf, 0, t.rkey); err != nil {
				b.Fatal(err)
			}
		}
	}
	type kind struct {
		name  string
		run   func()
		got   []float64
		turns []float64 // medians
	}
	var kinds []kind
	pin(b, 0)
	defer pin(b, -1)
	for cpu := range min(runtime.NumCPU(), 2) {
		place := [...]string{"-one-cpu", "-own-cpu"}[cpu]
		in := invitation{Size: 4096, CPU: cpu + 1}
		sleeping := newTarget(b, UDPConfig{}, in)
		c := sleeping.tcpClient(b)
		req, buf := tcpRequest(8, 1), make([]byte, 8)
		kinds = append(kinds, kind{name: "sleeping" + place, run: read(sleeping)},
			kind{name: "tcp" + place, run: func() {
				c.Write(req)
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Fatal(err)
				}
			}})
		if cpu > 0 || runtime.NumCPU() == 1 {
			kinds = append(kinds, kind{name: "busy" + place, run: read(newTarget(b, UDPConfig{Spin: 200 * time.Microsecond}, in))})
		}
	}
	slice := make([]float64, rounds)
	for b.Loop() {
		for range turns {
			for i := range kinds {
				k := &kinds[i]
				for j := range slice {
					start := time.Now()
					k.run()
					slice[j] = float64(time.Since(start)) / 1e3
				}
				k.got = append(k.got, slice...)
				k.turns = append(k.turns, median(slice))
				time.Sleep(time.Millisecond) // let spinning end
			}
		}
	}
	// best returns the turns of the way of a kind that was the faster one.
	best := func(name string) (v []float64) {
		for _, k := range kinds {
			if strings.HasPrefix(k.name, name) && (v == nil || median(k.turns) < median(v)) {
				v = k.turns
			}
		}
		return v
	}
	for _, k := range kinds {
		slices.Sort(k.got)
		b.ReportMetric(median(k.got), k.name+"-p50-µs")
		b.ReportMetric(k.got[len(k.got)*99/100], k.name+"-p99-µs")
	}
	for _, name := range []string{"sleeping", "busy", "tcp"} {
		b.ReportMetric(median(best(name)), name+"-p50-µs")
	}
	b.ReportMetric(paired(best("sleeping"), best("tcp")), "sleeping/tcp")
	b.ReportMetric(paired(best("busy"), best("tcp")), "busy/tcp")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkScatter reads 1000 pages at random places, all at once and one by one. Client and server have a CPU each, where there
// are two, as a monitor and an agent have.
func BenchmarkScatter(b *testing.B) {
	const pages = 1000
	pin(b, 0)
	defer pin(b, -1)
	t := newTarget(b, UDPConfig{}, invitation{Size: 64 << 20, CPU: min(runtime.NumCPU(), 2)})
	wrs, out := make([]WorkRequest, pages), make([]Completion, pages)
	for i := range wrs {
		wrs[i] = WorkRequest{Verb: VerbRead, Buf: make([]byte, 4096), Addr: uint64(random32()%(64<<20>>12)) << 12, RKey: t.rkey}
	}
	var at, one []float64
	for b.Loop() {
		start := time.Now()
		if err := t.q.Do(context.Background(), wrs, out); err != nil {
			b.Fatal(err)
		}
		at = append(at, time.Since(start).Seconds())
		start = time.Now()
		for _, w := range wrs {
			if err := t.q.Read(context.Background(), w.Buf, w.Addr, w.RKey); err != nil {
				b.Fatal(err)
			}
		}
		one = append(one, time.Since(start).Seconds())
	}
	b.ReportMetric(median(one)/median(at), "one-by-one/at-once")
	b.ReportMetric(median(at)*1e6/pages, "µs/page")
	b.ReportMetric(0, "ns/op")
}

// TestAllocations: the fast path allocates nothing, neither in the engines nor in links and devices.
func TestAllocations(t *testing.T) {
	s := newSim(t, 1, faults{}, Limits{})
	a, b := s.pair(QPConfig{}, QPConfig{})
	m := s.register(s.b, NewBuffer(1<<20), MRConfig{Length: 1 << 20, Access: allAccess})
	buf, msg := make([]byte, 100<<10), make([]byte, 5000)
	out := newOutbox()
	exchange := func() {
		for busy := true; busy; {
			busy = false
			for _, e := range []*simEnd{s.a, s.b} {
				out.reset()
				e.transmit(s.now, out)
				for i := range out.n {
					wire := s.check.seal(e.addr, &out.packets[i], 0)
					data, _, ok := s.check.open(e.addr, out.packets[i].Peer, wire)
					if !ok {
						t.Fatal("bad ICRC")
					}
					e.peer.receive(s.now, &Packet{Peer: e.addr, Data: data})
				}
				busy = busy || out.n > 0
			}
		}
		s.now += time.Microsecond
	}
	for _, tt := range []struct {
		name string
		wr   WorkRequest
	}{
		{"READ", WorkRequest{Verb: VerbRead, Buf: buf, RKey: m.key}},
		{"WRITE", WorkRequest{Verb: VerbWrite, Buf: buf, RKey: m.key}},
		{"FETCH_AND_ADD", WorkRequest{Verb: VerbFetchAdd, RKey: m.key, SwapAdd: 1}},
		{"CMP_AND_SWP", WorkRequest{Verb: VerbCompareSwap, RKey: m.key, SwapAdd: 1}},
		{"SEND", WorkRequest{Verb: VerbSend, Buf: msg}},
	} {
		if n := testing.AllocsPerRun(50, func() {
			a.done, b.done = a.done[:0], b.done[:0]
			if tt.wr.Verb == VerbSend {
				b.resp.post(recvRequest{buf: buf})
			}
			s.post(a, tt.wr)
			exchange()
			if len(a.done) != 1 || a.done[0].Err != nil {
				t.Fatalf("%s: %v", tt.name, a.done)
			}
		}); n != 0 {
			t.Errorf("%s: %g allocations", tt.name, n)
		}
	}
	for _, cfg := range []UDPConfig{{}, {NoOffload: true}} {
		x := benchTarget(t, cfg, 1<<20, true)
		for _, size := range []int{8, 64 << 10} {
			if n := testing.AllocsPerRun(100, func() {
				if err := x.q.Read(context.Background(), buf[:size], 0, x.rkey); err != nil {
					t.Fatal(err)
				}
			}); n >= 1 {
				t.Errorf("READ of %d bytes over UDP (%+v): %g allocations", size, cfg, n)
			}
		}
	}
}
