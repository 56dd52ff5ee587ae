package remote_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem/hostmemtest"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem/remote"
	"github.com/backdoor-rhs/backdoor/nicfw/roce"
)

// region is host memory as a roce.Region, without any rules.
type region struct{ *hostmem.RAMFile }

func (r region) ReadAt(p []byte, off int64) (int, error) {
	n, err := r.RAMFile.ReadAt(p, off)
	return n, refusal(err)
}

func (r region) WriteAt(p []byte, off int64) (int, error) {
	n, err := r.RAMFile.WriteAt(p, off)
	return n, refusal(err)
}

func (r region) CompareAndSwap(off int64, old, new uint64) (uint64, error) {
	prev, err := r.RAMFile.CompareAndSwap(hostmem.PhysAddr(off), old, new)
	return prev, refusal(err)
}

func refusal(err error) error {
	if err == nil {
		return nil
	}
	return errors.Join(roce.ErrAccess, err)
}

// agent serves a RAM file over a pipe.
type agent struct {
	monitor, device *roce.Device
	mem             *hostmem.RAMFile
	how             roce.Access
	patience        time.Duration // with one attempt
	connects        atomic.Int64
	down            atomic.Bool
	qp              *roce.QP // of the agent, of the latest connection
	mr              *roce.MR
}

func newAgent(t testing.TB, how roce.Access, wrap func(roce.Link) roce.Link, faults roce.Faults) *agent {
	t.Helper()
	layout, size := hostmemtest.Layout(hostmemtest.Map())
	path := filepath.Join(t.TempDir(), "ram")
	if err := os.WriteFile(path, hostmemtest.File(layout, size), 0o600); err != nil {
		t.Fatal(err)
	}
	mem, err := hostmem.OpenRAMFile(path, layout, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	// Eight time-outs end a connection, and with it a swap: on a busy machine an agent may not run for some hundredths of a second.
	a := &agent{mem: mem, how: how, patience: 50 * time.Millisecond}
	if faults != (roce.Faults{}) {
		a.patience = 5 * time.Millisecond // reads only, which are done again
	}
	la, lb := roce.NewPipe(netip.MustParseAddrPort("10.0.0.1:4791"), netip.MustParseAddrPort("10.0.0.2:4791"), 4096, faults)
	if wrap != nil {
		la, lb = wrap(la), wrap(lb)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 2)
	for link, d := range map[roce.Link]**roce.Device{la: &a.monitor, lb: &a.device} {
		dev, err := roce.Open(link, roce.Config{})
		if err != nil {
			t.Fatal(err)
		}
		*d = dev
		go func() { done <- dev.Run(ctx) }()
	}
	t.Cleanup(func() {
		stop()
		<-done
		<-done
		a.monitor.Close()
		a.device.Close()
	})
	return a
}

var errDown = errors.New("nobody is there")

// connect is what a Memory connects with.
func (a *agent) connect(context.Context) (w remote.Window, err error) {
	a.connects.Add(1)
	if a.down.Load() {
		return w, errDown
	}
	pd := a.device.NewPD()
	if a.mr, err = pd.Register(region{a.mem}, roce.MRConfig{Length: 1 << 40, Access: a.how}); err != nil {
		return w, err
	}
	ours, err := a.monitor.NewQP(a.monitor.NewPD(), nil, roce.QPConfig{AckTimeout: a.patience})
	if err != nil {
		return w, err
	}
	if a.qp, err = a.device.NewQP(pd, nil, roce.QPConfig{}); err != nil {
		return w, err
	}
	err = errors.Join(
		ours.Connect(roce.Remote{Addr: a.device.Link().LocalAddr().Addr(), QPN: a.qp.QPN(), PSN: a.qp.PSN()}),
		a.qp.Connect(roce.Remote{Addr: a.monitor.Link().LocalAddr().Addr(), QPN: ours.QPN(), PSN: ours.PSN()}))
	return remote.Window{QP: ours, RKey: a.mr.RKey(), Length: 1 << 40, RAM: a.mem.Map(), Write: a.how&roce.AccessWrite != 0, Atomic: a.how&roce.AccessAtomic != 0}, err
}

func (a *agent) open(t testing.TB) *remote.Memory {
	t.Helper()
	m, err := remote.Open(t.Context(), a.connect, remote.Options{Retry: time.Nanosecond})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

const all = roce.AccessRead | roce.AccessWrite | roce.AccessAtomic

func TestConformance(t *testing.T) {
	for _, c := range []struct {
		name   string
		how    roce.Access
		faults roce.Faults
	}{
		{"read-only", roce.AccessRead, roce.Faults{}},
		{"everything", all, roce.Faults{}},
		{"bad network", roce.AccessRead, roce.Faults{Seed: 1, Loss: 0.01, Dup: 0.01, Reorder: 0.01, Corrupt: 0.01}},
	} {
		t.Run(c.name, func(t *testing.T) {
			hostmemtest.Run(t, func(t *testing.T) (hostmem.Memory, hostmemtest.Truth) {
				return newAgent(t, c.how, nil, c.faults).open(t), hostmemtest.Truth{
					Map: hostmemtest.Map(), Writer: c.how&roce.AccessWrite != 0, Swapper: c.how&roce.AccessAtomic != 0,
				}
			})
		})
	}
}

// page reads the first page and tells whether it is right.
func page(t *testing.T, m *remote.Memory) error {
	t.Helper()
	got, want := make([]byte, hostmem.PageSize), make([]byte, hostmem.PageSize)
	hostmemtest.Fill(want, 0x1000)
	if _, err := m.ReadAt(got, 0x1000); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		t.Errorf("page at 0x1000 is % .16x…; want % .16x…", got, want)
	}
	return nil
}

func TestConnectsAnew(t *testing.T) {
	a := newAgent(t, all, nil, roce.Faults{})
	m := a.open(t)
	defer m.Close()
	for i, hurt := range []func(){
		func() { a.mr.Revoke() },                                   // the lease is over
		func() { a.qp.Close() },                                    // the agent has forgotten us
		func() { m.ReadAt(make([]byte, 8), 0x1000); a.qp.Close() }, // between two reads
	} {
		hurt()
		if err := page(t, m); err != nil {
			t.Fatalf("read %d: %v", i, err)
		}
		if n := a.connects.Load(); n != int64(i)+2 {
			t.Fatalf("after %d failures there were %d connections", i+1, n)
		}
	}
	a.mr.Revoke()
	a.down.Store(true)
	var fault *hostmem.FaultError
	if err := page(t, m); !errors.As(err, &fault) || !errors.Is(err, hostmem.ErrLinkDown) || !errors.Is(err, errDown) {
		t.Fatalf("read without an agent = %v", err)
	}
	a.down.Store(false)
	if err := page(t, m); err != nil {
		t.Fatalf("read after the agent came back: %v", err)
	}
}

// A store that the connection's failure cut off is not done again behind the caller's back.
func TestStoresAreNotRepeated(t *testing.T) {
	a := newAgent(t, all, nil, roce.Faults{})
	m := a.open(t)
	defer m.Close()
	a.mr.Revoke()
	if n, err := m.WriteAt(make([]byte, 8), 0x1000); n != 0 || err == nil {
		t.Fatalf("write through a revoked window = %d, %v", n, err)
	}
	if n := a.connects.Load(); n != 1 {
		t.Errorf("%d connections; want none after a store that failed", n)
	}
	a.mr.Revoke()
	if _, err := m.CompareAndSwap(0x1000, 0, 1); err != nil {
		t.Fatalf("swap after connecting anew: %v", err)
	}
	a.mr.Revoke()
	if _, err := m.CompareAndSwap(0x1000, 0, 1); err == nil {
		t.Fatal("swap through a revoked window = nil")
	}
	if err := page(t, m); err != nil {
		t.Fatal(err)
	}
}

// Pieces that the agent refuses fail by themselves, though each refusal ends the connection.
func TestRefusedPieces(t *testing.T) {
	a := newAgent(t, roce.AccessRead, nil, roce.Faults{})
	m, err := remote.Open(t.Context(), func(ctx context.Context) (remote.Window, error) {
		w, err := a.connect(ctx)
		w.RAM = []hostmem.Range{{Start: 0x1000, Size: 0xf000}} // more than there is
		return w, err
	}, remote.Options{Retry: time.Nanosecond})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	segs := []hostmem.Segment{
		{Addr: 0x1000, Buf: make([]byte, 4096)}, {Addr: 0x5000, Buf: make([]byte, 8)}, {Addr: 0x8000, Buf: make([]byte, 4096)},
		{Addr: 0x6000, Buf: make([]byte, 8)}, {Addr: 0x9000, Buf: make([]byte, 8)},
	}
	if err := m.ReadScatter(segs); err == nil {
		t.Error("ReadScatter = nil")
	}
	for i, bad := range []bool{false, true, false, true, false} {
		want := make([]byte, len(segs[i].Buf))
		hostmemtest.Fill(want, segs[i].Addr)
		switch {
		case bad != (segs[i].Err != nil):
			t.Errorf("segment %d: %v", i, segs[i].Err)
		case !bad && !bytes.Equal(segs[i].Buf, want):
			t.Errorf("segment %d is % .8x…; want % .8x…", i, segs[i].Buf, want)
		}
	}
	var nak *roce.NAKError
	if !errors.As(segs[1].Err, &nak) || nak.Syndrome != roce.NAKRemoteAccess {
		t.Errorf("refused segment: %v; want a remote access error", segs[1].Err)
	}
}

// late is a link whose packets take a while.
type late struct {
	roce.Link
	d     time.Duration
	queue chan timed
}

type timed struct {
	at      time.Time
	packets []roce.Packet
}

func newLate(d time.Duration) func(roce.Link) roce.Link {
	return func(l roce.Link) roce.Link {
		x := &late{l, d, make(chan timed, 1<<14)}
		go func() {
			for t := range x.queue {
				for time.Until(t.at) > 0 {
					time.Sleep(max(time.Until(t.at)-60*time.Microsecond, 0))
				}
				x.Link.Send(t.packets)
			}
		}()
		return x
	}
}

func (l *late) Send(ps []roce.Packet) error {
	t := timed{time.Now().Add(l.d), make([]roce.Packet, len(ps))}
	for i, p := range ps {
		data := make([]byte, len(p.Data), len(p.Data)+16)
		copy(data, p.Data)
		t.packets[i] = roce.Packet{Peer: p.Peer, Data: data}
	}
	select {
	case l.queue <- t:
	default:
	}
	return nil
}

// BenchmarkScatter reads 1000 random pages over a network with a round trip of 100 µs: all at once, and one after the other.
// "ratio" is how many times as fast the first is, in alternating rounds.
func BenchmarkScatter(b *testing.B) {
	a := newAgent(b, roce.AccessRead, newLate(50*time.Microsecond), roce.Faults{})
	m := a.open(b)
	defer m.Close()
	rng := rand.New(rand.NewPCG(1, 1))
	segs := make([]hostmem.Segment, 1000)
	r := hostmemtest.Map()[2]
	for i := range segs {
		pa := r.Start + hostmem.PhysAddr(rng.Uint64N(r.Size/hostmem.PageSize)*hostmem.PageSize)
		segs[i] = hostmem.Segment{Addr: pa, Buf: make([]byte, hostmem.PageSize)}
	}
	var scattered, single time.Duration
	for b.Loop() {
		t0 := time.Now()
		if err := m.ReadScatter(segs); err != nil {
			b.Fatal(err)
		}
		t1 := time.Now()
		for i := range segs {
			if _, err := m.ReadAt(segs[i].Buf, int64(segs[i].Addr)); err != nil {
				b.Fatal(err)
			}
		}
		scattered, single = scattered+t1.Sub(t0), single+time.Since(t1)
	}
	b.ReportMetric(float64(single)/float64(scattered), "ratio")
	b.ReportMetric(scattered.Seconds()*1e3/float64(b.N), "ms/scattered")
	b.ReportMetric(single.Seconds()*1e3/float64(b.N), "ms/single")
}
