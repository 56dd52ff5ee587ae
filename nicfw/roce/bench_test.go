//go:build linux

package roce

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"
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

// target is a device that serves memory over loopback and a queue pair that reaches it.
type target struct {
	q  *QP
	mr *MR
}

func benchTarget(b testing.TB, cfg UDPConfig, size int, icrc bool) target {
	la, lb := udpPair(b, cfg)
	for _, l := range []Link{la, lb} {
		l.(*udpLink).rx.off, l.(*udpLink).tx.off = !icrc, !icrc
	}
	da, db := openDevices(b, la, lb)
	qa, _, pd := joined(b, da, db, QPConfig{})
	mr, err := pd.Register(make(flat, size), MRConfig{Length: uint64(size), Access: AccessRead | AccessWrite})
	if err != nil {
		b.Fatal(err)
	}
	return target{qa, mr}
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
			if _, err := t.q.Post(WorkRequest{ID: uint64(i), Verb: VerbRead, Buf: bufs[i], RKey: t.mr.RKey()}); err != nil {
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
		wrs[i] = WorkRequest{Verb: VerbWrite, Buf: buf, RKey: t.mr.RKey()}
	}
	if err := t.q.Do(context.Background(), wrs, out); err != nil {
		b.Fatal(err)
	}
}

// tcpPair returns the two ends of a TCP connection over loopback.
func tcpPair(b testing.TB) (a, c *net.TCPConn) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	ch := make(chan net.Conn, 1)
	go func() {
		c, _ := l.Accept()
		ch <- c
	}()
	d, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	s := <-ch
	b.Cleanup(func() { d.Close(); s.Close() })
	return d.(*net.TCPConn), s.(*net.TCPConn)
}

// tcpStream moves total bytes over a connection, in blocks as iperf3 uses them.
func tcpStream(b testing.TB, total int) {
	a, c := tcpPair(b)
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 128<<10)
		for n := 0; n < total; n += len(buf) {
			a.Write(buf)
		}
		a.CloseWrite()
	})
	buf := make([]byte, 128<<10)
	for {
		if _, err := c.Read(buf); err != nil {
			break
		}
	}
	wg.Wait()
}

// tcpServe answers each 8-byte request with as many bytes as it says.
func tcpServe(c net.Conn, size int) {
	req, buf := make([]byte, 8), make([]byte, size)
	for {
		if _, err := io.ReadFull(c, req); err != nil {
			return
		}
		if _, err := c.Write(buf[:binary.LittleEndian.Uint64(req)]); err != nil {
			return
		}
	}
}

// tcpRead does what target.read does by request and response over TCP.
func tcpRead(b testing.TB, total, size, depth int) {
	a, c := tcpPair(b)
	go tcpServe(c, size)
	req := binary.LittleEndian.AppendUint64(nil, uint64(size))
	buf := make([]byte, size)
	for range depth {
		a.Write(req)
	}
	for n := total / size; n > 0; n-- {
		io.ReadFull(a, buf)
		if n > depth {
			a.Write(req)
		}
	}
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// BenchmarkThroughput reads 64 KiB at a time, 16 at once, with and without the ICRC, against one TCP stream and against
// pipelined requests over TCP, in turn in one run. It reports GB/s and ratios of medians.
func BenchmarkThroughput(b *testing.B) {
	const total, size, depth = 256 << 20, 64 << 10, 16
	with := benchTarget(b, UDPConfig{}, size, true)
	without := benchTarget(b, UDPConfig{}, size, false)
	single := benchTarget(b, UDPConfig{NoOffload: true}, size, true)
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
		{"tcp-stream", func() { tcpStream(b, total) }, nil},
		{"tcp-request", func() { tcpRead(b, total, size, depth) }, nil},
	}
	for i := range kinds { // warm up
		kinds[i].run()
	}
	for b.Loop() {
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
	for _, k := range kinds {
		b.ReportMetric(median(k.got), k.name+"-GB/s")
	}
	b.ReportMetric(median(kinds[0].got)/median(kinds[5].got), "read/tcp-stream")
	b.ReportMetric(median(kinds[0].got)/median(kinds[6].got), "read/tcp-request")
	b.ReportMetric(median(kinds[0].got)/median(kinds[1].got), "icrc-on/off")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkLatency reads 8 bytes at a time, sleeping and busy polling, against request and response over TCP, in turn in
// one run. It reports the median and the 99th percentile in µs, and ratios of medians.
func BenchmarkLatency(b *testing.B) {
	const rounds = 5000
	ctx := context.Background()
	read := func(t target) func() {
		buf := make([]byte, 8)
		return func() {
			if err := t.q.Read(ctx, buf, 0, t.mr.RKey()); err != nil {
				b.Fatal(err)
			}
		}
	}
	a, c := tcpPair(b)
	go tcpServe(c, 8)
	req, buf := binary.LittleEndian.AppendUint64(nil, 8), make([]byte, 8)
	kinds := []struct {
		name string
		run  func()
		got  []float64
	}{
		{"sleeping", read(benchTarget(b, UDPConfig{}, 4096, true)), nil},
		{"busy", read(benchTarget(b, UDPConfig{Spin: 200 * time.Microsecond}, 4096, true)), nil},
		{"tcp", func() { a.Write(req); io.ReadFull(a, buf) }, nil},
	}
	for b.Loop() {
		for i := range kinds {
			k := &kinds[i]
			for range rounds {
				start := time.Now()
				k.run()
				k.got = append(k.got, float64(time.Since(start))/1e3)
			}
			time.Sleep(10 * time.Millisecond) // let spinning end
		}
	}
	for _, k := range kinds {
		b.ReportMetric(median(k.got), k.name+"-p50-µs")
		b.ReportMetric(k.got[len(k.got)*99/100], k.name+"-p99-µs")
	}
	b.ReportMetric(median(kinds[0].got)/median(kinds[2].got), "sleeping/tcp")
	b.ReportMetric(median(kinds[1].got)/median(kinds[2].got), "busy/tcp")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkScatter reads 1000 pages at random places, all at once and one by one.
func BenchmarkScatter(b *testing.B) {
	const pages = 1000
	t := benchTarget(b, UDPConfig{}, 64<<20, true)
	wrs, out := make([]WorkRequest, pages), make([]Completion, pages)
	for i := range wrs {
		wrs[i] = WorkRequest{Verb: VerbRead, Buf: make([]byte, 4096), Addr: uint64(random32()%(64<<20>>12)) << 12, RKey: t.mr.RKey()}
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
				if err := x.q.Read(context.Background(), buf[:size], 0, x.mr.RKey()); err != nil {
					t.Fatal(err)
				}
			}); n >= 1 {
				t.Errorf("READ of %d bytes over UDP (%+v): %g allocations", size, cfg, n)
			}
		}
	}
}
