package roce

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// pipeDevices returns two devices over a pipe, of which the second runs.
func pipeDevices(t *testing.T, f Faults) (a, b *Device) {
	t.Helper()
	la, lb := NewPipe(netip.MustParseAddrPort("[fd00::a]:4791"), netip.MustParseAddrPort("[fd00::b]:4791"), 4096, f)
	return openDevices(t, la, lb)
}

func openDevices(t testing.TB, la, lb Link) (a, b *Device) {
	t.Helper()
	a, err := Open(la, Config{})
	if err != nil {
		t.Fatal(err)
	}
	b, err = Open(lb, Config{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; !errors.Is(err, context.Canceled) && !errors.Is(err, net.ErrClosed) {
			t.Errorf("Run: %v", err)
		}
		if err := errors.Join(a.Close(), b.Close()); err != nil {
			t.Error(err)
		}
	})
	return a, b
}

// joined returns two connected queue pairs without connection management.
func joined(t testing.TB, a, b *Device, cfg QPConfig) (qa, qb *QP, pd *PD) {
	t.Helper()
	pd = b.NewPD()
	qa, err := a.NewQP(a.NewPD(), a.NewCQ(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	qb, err = b.NewQP(pd, b.NewCQ(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(
		qa.Connect(Remote{b.link.LocalAddr().Addr(), qb.QPN(), qb.PSN()}),
		qb.Connect(Remote{a.link.LocalAddr().Addr(), qa.QPN(), qa.PSN()}))
	if err != nil {
		t.Fatal(err)
	}
	return qa, qb, pd
}

// TestEndsWhileItIsAbandoned has a request end with an error while its caller, whose context is over, waits for the device's lock to
// let go of it: the device must go on.
func TestEndsWhileItIsAbandoned(t *testing.T) {
	a, b := pipeDevices(t, Faults{})
	qa, _, _ := joined(t, a, b, QPConfig{})
	a.seat <- struct{}{} // somebody else drives

	ctx, cancel := context.WithCancel(t.Context())
	sent := make(chan error, 1)
	go func() { sent <- qa.Send(ctx, []byte("nobody has posted a receive")) }()
	for { // until it is under way
		a.mu.Lock()
		if qa.q.req.sq.n > 0 {
			break
		}
		a.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
	cancel()
	time.Sleep(50 * time.Millisecond) // until Send waits for mu; if it is later, this tests nothing
	a.eng.closeQP(a.now(), qa.q, ErrFlushed)
	a.mu.Unlock()
	<-a.seat
	select {
	case err := <-sent:
		if !errors.Is(err, ErrFlushed) && !errors.Is(err, context.Canceled) {
			t.Errorf("Send: %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("Send does not come back")
	}
	qa.Peer() // takes the lock
}

// exercise uses everything that two queue pairs can do.
func exercise(t *testing.T, qa, qb *QP, pd *PD) {
	t.Helper()
	ctx := context.Background()
	mem := NewBuffer(1 << 20)
	mr, err := pd.Register(mem, MRConfig{Addr: 1 << 40, Length: 1 << 20, Access: allAccess})
	if err != nil {
		t.Fatal(err)
	}
	want, got := bytes.Repeat([]byte("backdoor"), 20000), make([]byte, 160000)
	if err := qa.Write(ctx, want, mr.Addr()+1000, mr.RKey()); err != nil {
		t.Fatal(err)
	}
	if err := qa.Read(ctx, got, mr.Addr()+1000, mr.RKey()); err != nil || !bytes.Equal(want, got) {
		t.Fatalf("read: %v", err)
	}
	for i := range uint64(5) {
		if prev, err := qa.FetchAdd(ctx, mr.Addr(), mr.RKey(), 3); err != nil || prev != 3*i {
			t.Fatalf("fetch and add = %d, %v", prev, err)
		}
	}
	if prev, err := qa.CompareAndSwap(ctx, mr.Addr(), mr.RKey(), 15, 99); err != nil || prev != 15 {
		t.Fatalf("compare and swap = %d, %v", prev, err)
	}
	if prev, err := qa.CompareAndSwap(ctx, mr.Addr(), mr.RKey(), 15, 100); err != nil || prev != 99 {
		t.Fatalf("compare and swap = %d, %v", prev, err)
	}
	// Many at once: more than the queue has room for.
	wrs, out := make([]WorkRequest, 1000), make([]Completion, 1000)
	for i := range wrs {
		wrs[i] = WorkRequest{ID: uint64(i), Verb: VerbRead, Buf: make([]byte, 8), Addr: mr.Addr() + 1000 + uint64(i*8), RKey: mr.RKey()}
	}
	if err := qa.Do(ctx, wrs, out); err != nil {
		t.Fatal(err)
	}
	for i := range wrs {
		if out[i].ID != uint64(i) || string(wrs[i].Buf) != "backdoor" {
			t.Fatalf("read %d: %+v %q", i, out[i], wrs[i].Buf)
		}
	}
	// Messages, both ways. Who receives must acknowledge, again if need be, and so be driven when nobody waits any more.
	run, stop := context.WithCancel(ctx)
	var driver sync.WaitGroup
	driver.Go(func() { qa.d.Run(run) })
	defer driver.Wait()
	defer stop()
	recv := make(chan error, 1)
	go func() {
		buf := make([]byte, 100)
		c, err := qb.Recv(ctx, buf)
		if err == nil {
			err = qb.Send(ctx, append([]byte("you said "), buf[:c.Len]...))
		}
		recv <- err
	}()
	answer := make([]byte, 100)
	done := make(chan Completion, 1)
	go func() {
		c, _ := qa.Recv(ctx, answer)
		done <- c
	}()
	if err := qa.Send(ctx, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	if c := <-done; c.Err != nil || string(answer[:c.Len]) != "you said hello" {
		t.Fatalf("answer %q, %v", answer[:c.Len], c.Err)
	}
	if err := <-recv; err != nil {
		t.Fatal(err)
	}
	// And through completion queues.
	if _, err := qa.Post(WorkRequest{ID: 1, Verb: VerbWrite, Buf: []byte("12345678"), Addr: mr.Addr(), RKey: mr.RKey()}, WorkRequest{ID: 2, Verb: VerbRead, Buf: got[:8], Addr: mr.Addr(), RKey: mr.RKey()}); err != nil {
		t.Fatal(err)
	}
	for n := 0; n < 2; {
		k, err := qa.cq.Wait(ctx, out[n:2])
		if err != nil {
			t.Fatal(err)
		}
		n += k
	}
	if out[0].ID != 1 || out[1].ID != 2 || out[1].Err != nil || string(got[:8]) != "12345678" {
		t.Fatalf("completions %+v, read %q", out[:2], got[:8])
	}
}

func TestDeviceOverPipe(t *testing.T) {
	for _, f := range []Faults{{}, {Seed: 1, Loss: 0.02, Dup: 0.02, Reorder: 0.02, Corrupt: 0.02}} {
		synctest.Test(t, func(t *testing.T) {
			a, b := pipeDevices(t, f)
			qa, qb, pd := joined(t, a, b, QPConfig{AckTimeout: 5 * time.Millisecond})
			exercise(t, qa, qb, pd)
		})
	}
}

func TestDeviceOverUDP(t *testing.T) {
	for _, cfg := range []UDPConfig{{}, {NoOffload: true}, {Spin: 20 * time.Microsecond}} {
		la, lb := udpPair(t, cfg)
		a, b := openDevices(t, la, lb)
		qa, qb, pd := joined(t, a, b, QPConfig{})
		exercise(t, qa, qb, pd)
	}
}

// TestConnectionManager connects, talks and disconnects as applications do.
func TestConnectionManager(t *testing.T) {
	for _, f := range []Faults{{}, {Seed: 3, Loss: 0.05, Dup: 0.05, Reorder: 0.05}} {
		synctest.Test(t, func(t *testing.T) {
			ctx := context.Background()
			a, b := pipeDevices(t, f)
			l, err := b.Listen(ServiceTCP(7471))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := b.Listen(ServiceTCP(7471)); err == nil {
				t.Error("two listeners for one service")
			}
			pd := b.NewPD()
			accepted := make(chan *QP)
			go func() {
				for {
					r, err := l.Accept(ctx)
					if err != nil {
						close(accepted)
						return
					}
					if string(r.Private()[:5]) != "token" {
						r.Reject([]byte("who are you?"))
						continue
					}
					if r.Peer() != a.link.LocalAddr().Addr() || r.PathMTU() != 4096 {
						t.Errorf("request of %v with path MTU %d", r.Peer(), r.PathMTU())
					}
					q, err := r.Accept(pd, b.NewCQ(), QPConfig{AckTimeout: 5 * time.Millisecond}, []byte("key"))
					if err != nil {
						t.Error(err)
					}
					accepted <- q
				}
			}()
			var rej *RejectError
			if _, _, err := a.Dial(ctx, b.link.LocalAddr().Addr(), ServiceTCP(7471), a.NewPD(), nil, QPConfig{}, []byte("stranger")); !errors.As(err, &rej) || !bytes.HasPrefix(rej.Private, []byte("who are you?")) {
				t.Errorf("dial without token: %v", err)
			}
			qa, private, err := a.Dial(ctx, b.link.LocalAddr().Addr(), ServiceTCP(7471), a.NewPD(), a.NewCQ(), QPConfig{AckTimeout: 5 * time.Millisecond}, []byte("token"))
			if err != nil || !bytes.HasPrefix(private, []byte("key\x00")) {
				t.Fatalf("dial: %q, %v", private, err)
			}
			qb := <-accepted
			exercise(t, qa, qb, pd)
			run, stop := context.WithCancel(ctx)
			var wg sync.WaitGroup
			wg.Go(func() { a.Run(run) })
			defer wg.Wait()
			defer stop()
			qb.Close()
			<-qa.Done()
			if !errors.Is(qa.Err(), ErrDisconnected) {
				t.Errorf("ended: %v", qa.Err())
			}
			if err := qa.Read(ctx, make([]byte, 1), 0, 0); !errors.Is(err, ErrDisconnected) {
				t.Errorf("read after the end: %v", err)
			}
			qa.Close()
			l.Close()
			if _, ok := <-accepted; ok {
				t.Error("accepted after Close")
			}
			short, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			if _, _, err := a.Dial(short, b.link.LocalAddr().Addr(), ServiceTCP(7471), a.NewPD(), nil, QPConfig{}, nil); !errors.As(err, &rej) || rej.Reason != RejectInvalidService {
				t.Errorf("dial a closed service: %v", err)
			}
		})
	}
}

func TestCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := pipeDevices(t, Faults{Loss: 1})
		qa, _, _ := joined(t, a, b, QPConfig{RetryCount: 7, AckTimeout: time.Second})
		for _, f := range []func(ctx context.Context) error{
			func(ctx context.Context) error { return qa.Read(ctx, make([]byte, 100), 0, 1) },
			func(ctx context.Context) error { return qa.Write(ctx, make([]byte, 100), 0, 1) },
			func(ctx context.Context) error { _, err := qa.Recv(ctx, make([]byte, 100)); return err },
			func(ctx context.Context) error { _, err := qa.cq.Wait(ctx, make([]Completion, 1)); return err },
			func(ctx context.Context) error {
				_, _, err := a.Dial(ctx, b.link.LocalAddr().Addr(), 1, a.NewPD(), nil, QPConfig{}, nil)
				return err
			},
		} {
			ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
			start := time.Now()
			if err := f(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 100*time.Millisecond {
				t.Errorf("%v after %v", err, time.Since(start))
			}
			cancel()
		}
		// What was abandoned does not come back, and others go on.
		if err := qa.Read(context.Background(), make([]byte, 8), 0, 1); !errors.Is(err, ErrRetryExceeded) && !errors.Is(err, ErrFlushed) {
			t.Error(err)
		}
	})
}

// TestAbandonedRead: the answer to a READ that nobody waits for any more does not go into the caller's memory.
func TestAbandonedRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		la, lb := NewPipe(netip.MustParseAddrPort("[fd00::a]:4791"), netip.MustParseAddrPort("[fd00::b]:4791"), 4096, Faults{})
		a, _ := Open(la, Config{})
		b, _ := Open(lb, Config{})
		qa, _, pd := joined(t, a, b, QPConfig{})
		mem := NewBuffer(8)
		mem.WriteAt([]byte("12345678"), 0)
		mr, _ := pd.Register(mem, MRConfig{Length: 8, Access: AccessRead})
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		buf := make([]byte, 8)
		if err := qa.Read(ctx, buf, 0, mr.RKey()); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		run, stop := context.WithCancel(context.Background())
		go b.Run(run)
		other := make([]byte, 8)
		if err := qa.Read(context.Background(), other, 0, mr.RKey()); err != nil || string(other) != "12345678" || buf[0] != 0 {
			t.Errorf("%v, buffers %q, %q", err, other, buf)
		}
		stop()
		a.Close()
		b.Close()
	})
}

func TestCloseEndsEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := pipeDevices(t, Faults{Loss: 1})
		qa, _, _ := joined(t, a, b, QPConfig{AckTimeout: time.Hour})
		l, _ := a.Listen(1)
		var wg sync.WaitGroup
		for _, f := range []func(ctx context.Context) error{
			func(ctx context.Context) error { return qa.Read(ctx, make([]byte, 100), 0, 1) },
			func(ctx context.Context) error { _, err := qa.Recv(ctx, make([]byte, 100)); return err },
			func(ctx context.Context) error { _, err := qa.cq.Wait(ctx, make([]Completion, 1)); return err },
			func(ctx context.Context) error { _, err := l.Accept(ctx); return err },
			func(ctx context.Context) error { return a.Run(ctx) },
		} {
			wg.Go(func() {
				if err := f(context.Background()); err == nil {
					t.Error("no error")
				}
			})
		}
		time.Sleep(time.Second)
		a.Close()
		wg.Wait()
		if _, err := a.NewQP(a.NewPD(), nil, QPConfig{}); !errors.Is(err, net.ErrClosed) {
			t.Errorf("new queue pair of a closed device: %v", err)
		}
	})
}

// TestConcurrent lets many goroutines use one queue pair and one device at the same time, over real sockets.
func TestConcurrent(t *testing.T) {
	la, lb := udpPair(t, UDPConfig{})
	a, b := openDevices(t, la, lb)
	qa, _, pd := joined(t, a, b, QPConfig{SendDepth: 3})
	mem := NewBuffer(1 << 16)
	mr, err := pd.Register(mem, MRConfig{Length: 1 << 16, Access: allAccess})
	if err != nil {
		t.Fatal(err)
	}
	const workers, rounds = 8, 100
	var wg sync.WaitGroup
	for i := range workers {
		wg.Go(func() {
			ctx := context.Background()
			at := uint64(1024 * (i + 1))
			for n := range uint64(rounds) {
				want, got := make([]byte, 500), make([]byte, 500)
				binary.LittleEndian.PutUint64(want, n)
				err := qa.Write(ctx, want, at, mr.RKey())
				if err == nil {
					err = qa.Read(ctx, got, at, mr.RKey())
				}
				if err != nil || !bytes.Equal(want, got) {
					t.Errorf("worker %d: %v", i, err)
					return
				}
			}
			if _, err := qa.FetchAdd(ctx, 0, mr.RKey(), 1); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n, err := qa.FetchAdd(context.Background(), 0, mr.RKey(), 0); n != workers || err != nil {
		t.Errorf("counter %d, %v; want %d", n, err, workers)
	}
	mr.Revoke()
	var nak *NAKError
	if err := qa.Read(context.Background(), make([]byte, 8), 0, mr.RKey()); !errors.As(err, &nak) || nak.Syndrome != NAKRemoteAccess {
		t.Errorf("read of a revoked window: %v", err)
	}
}

// TestPolling uses a completion queue without waiting, with receives, and fills it.
func TestPolling(t *testing.T) {
	la, lb := udpPair(t, UDPConfig{})
	a, b := openDevices(t, la, lb)
	qa, qb, pd := joined(t, a, b, QPConfig{SendDepth: 4, RecvDepth: 4})
	mr, err := pd.Register(NewBuffer(64), MRConfig{Length: 64, Access: allAccess})
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 8)
	for i := range uint64(4) {
		if err := qb.PostRecv(i, make([]byte, 8)); err != nil {
			t.Fatal(err)
		}
	}
	if err := qb.PostRecv(4, nil); !errors.Is(err, ErrQueueFull) {
		t.Errorf("fifth receive: %v", err)
	}
	for i := range 4 {
		wr := WorkRequest{ID: uint64(i), Verb: VerbRead, Buf: buf, RKey: mr.RKey()}
		if i%2 == 1 {
			wr = WorkRequest{ID: uint64(i), Verb: VerbWrite, Buf: buf, RKey: mr.RKey(), Imm: uint32(i), HasImm: true}
		}
		if n, err := qa.Post(wr); n != 1 || err != nil {
			t.Fatal(err)
		}
	}
	if n, err := qa.Post(WorkRequest{Verb: VerbRead}, WorkRequest{Verb: VerbRead}); n != 0 || !errors.Is(err, ErrQueueFull) {
		t.Errorf("fifth request: %d, %v", n, err)
	}
	poll := func(q *QP, n int) (got []Completion) {
		out := make([]Completion, 3)
		for end := time.Now().Add(10 * time.Second); len(got) < n && time.Now().Before(end); {
			n, err := q.cq.Poll(out)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, out[:n]...)
		}
		return got
	}
	sent, received := poll(qa, 4), poll(qb, 2)
	if len(sent) != 4 || len(received) != 2 {
		t.Fatalf("%d and %d completions", len(sent), len(received))
	}
	for i, c := range sent {
		if c.ID != uint64(i) || c.Err != nil || c.QPN != qa.QPN() {
			t.Errorf("completion %d: %+v", i, c)
		}
	}
	for i, c := range received {
		if c.Verb != VerbRecv || c.Err != nil || !c.HasImm || c.Imm != uint32(2*i+1) {
			t.Errorf("receive %d: %+v", i, c)
		}
	}
	if n := a.Counters(); n.Sent == 0 || a.PathMTU() != 4096 || qa.PathMTU() != 4096 || qa.Peer() != lb.LocalAddr().Addr() {
		t.Errorf("counters %v, path MTU %d, %d, peer %v", n, a.PathMTU(), qa.PathMTU(), qa.Peer())
	}
	// Without a completion queue nothing can be posted to one.
	q, err := a.NewQP(a.NewPD(), nil, QPConfig{})
	if err != nil {
		t.Fatal(err)
	}
	if err := q.PostRecv(1, nil); err == nil {
		t.Error("receive posted without a completion queue")
	}
	if _, err := q.Post(WorkRequest{Verb: VerbRead}); !errors.Is(err, ErrNotConnected) {
		t.Errorf("posted without a peer: %v", err)
	}
	if err := q.Connect(Remote{Addr: lb.LocalAddr().Addr()}); err != nil {
		t.Fatal(err)
	}
	if _, err := q.Post(WorkRequest{Verb: VerbRead}); !errors.Is(err, errNoCQ) {
		t.Errorf("posted without a completion queue: %v", err)
	}
	if err := errors.Join(q.Close(), q.Close()); err != nil {
		t.Error(err)
	}
}

// TestBuffer compares a Buffer with a slice.
func TestBuffer(t *testing.T) {
	const size = 64
	b, want := NewBuffer(size-3), make([]byte, size)
	for off := range size + 2 {
		for n := range size + 2 {
			data := bytes.Repeat([]byte{byte(off*7 + n)}, n)
			done, err := b.WriteAt(data, int64(off))
			if fits := off+n <= size; (err == nil) != fits || done != max(min(n, size-off), 0) {
				t.Fatalf("write %d at %d = %d, %v", n, off, done, err)
			}
			copy(want[min(off, size):], data)
			got := make([]byte, n)
			done, err = b.ReadAt(got, int64(off))
			if fits := off+n <= size; (err == nil) != fits || !bytes.Equal(got[:done], want[min(off, size):min(off+done, size)]) {
				t.Fatalf("read %d at %d = %d, %v", n, off, done, err)
			}
		}
	}
	all := make([]byte, size)
	if _, err := b.ReadAt(all, 0); err != nil || !bytes.Equal(all, want) {
		t.Errorf("%v\n% x\n% x", err, all, want)
	}
	for _, off := range []int64{-8, 4, size} {
		if _, err := b.CompareAndSwap(off, 0, 0); !errors.Is(err, ErrAccess) {
			t.Errorf("swap at %d: %v", off, err)
		}
	}
}

// TestChangingMemory: memory that changes all the while is read, over real sockets, with a right ICRC in each packet, and
// no word of it is half old and half new.
func TestChangingMemory(t *testing.T) {
	la, lb := udpPair(t, UDPConfig{})
	a, b := openDevices(t, la, lb)
	qa, _, pd := joined(t, a, b, QPConfig{})
	const size = 256 << 10
	mem := NewBuffer(size)
	mr, err := pd.Register(mem, MRConfig{Length: size, Access: AccessRead})
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		page := make([]byte, 4096)
		for v := byte(1); ; v++ {
			for i := range page {
				page[i] = v
			}
			for off := int64(0); off < size; off += int64(len(page)) {
				mem.WriteAt(page, off)
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	})
	buf, mixed := make([]byte, size), 0
	for round := 0; round < 100 || mixed == 0 && round < 10000; round++ {
		if err := qa.Read(context.Background(), buf, 0, mr.RKey()); err != nil {
			t.Fatal(err)
		}
		for i := 0; i < size; i += 8 {
			w := binary.LittleEndian.Uint64(buf[i:])
			if w != w&0xff*0x0101010101010101 {
				t.Fatalf("word %d is torn: %#x", i/8, w)
			}
		}
		if buf[0] != buf[size-1] {
			mixed++
		}
	}
	close(stop)
	wg.Wait()
	for _, l := range []Link{la, lb} {
		if c := l.(*udpLink).Counters(); c.BadICRC != 0 {
			t.Errorf("counters %+v", c)
		}
	}
	if mixed == 0 {
		t.Error("the memory never changed during a READ: nothing was tried")
	}
}
