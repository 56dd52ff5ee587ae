package export

import (
	"context"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/nicfw/roce"
)

// recordedHost is a fake host with recorded memory.
type recordedHost struct {
	fakeHost
	mem hostmem.Memory
}

func (h *recordedHost) HostMemory() (hostmem.Memory, bool, error) { return h.mem, true, nil }

// far is a link whose packets take half a round trip each way. It wakes early and spins, for timers are coarse.
type far struct {
	roce.Link
	half  time.Duration
	queue chan farPackets
}

type farPackets struct {
	at      time.Time
	packets []roce.Packet
}

func newFar(l roce.Link, half time.Duration) *far {
	f := &far{l, half, make(chan farPackets, 1<<14)}
	go func() {
		for p := range f.queue {
			for time.Until(p.at) > 0 {
				time.Sleep(max(time.Until(p.at)-60*time.Microsecond, 0))
			}
			f.Link.Send(p.packets)
		}
	}()
	return f
}

func (f *far) Send(ps []roce.Packet) error {
	q := farPackets{time.Now().Add(f.half), make([]roce.Packet, len(ps))}
	for i, p := range ps {
		q.packets[i] = roce.Packet{Peer: p.Peer, Data: append(make([]byte, 0, len(p.Data)+16), p.Data...)}
	}
	f.queue <- q
	return nil
}

var ramFlag = flag.String("ram", "", "RAM `file` of a q35 guest to list over RDMA, instead of a recording")

// listed returns the memory of the guest of -ram, or a recorded one, and where its note is.
func listed(b *testing.B) (hostmem.Memory, uint64) {
	if *ramFlag != "" {
		fi, err := os.Stat(*ramFlag)
		if err != nil {
			b.Fatal(err)
		}
		mem, err := hostmem.OpenRAMFile(*ramFlag, hostmem.Q35Layout(uint64(fi.Size())), false)
		if err != nil {
			b.Fatal(err)
		}
		img, err := kernel.Open(b.Context(), mem, kernel.Options{})
		if err != nil {
			b.Fatal(err)
		}
		return mem, uint64(img.Info().Note)
	}
	files, err := filepath.Glob("../kernel/testdata/*.hostmem")
	if err != nil || len(files) == 0 {
		b.Fatalf("no recordings: %v", err)
	}
	mem, err := hostmem.OpenImage(files[0])
	if err != nil {
		b.Fatal(err)
	}
	note, err := strconv.ParseUint(mem.(*hostmem.Recording).Labels()["note"], 0, 64)
	if err != nil {
		b.Fatal(err)
	}
	return mem, note
}

// BenchmarkPS lists the tasks of a recorded host, which lacks what could be read ahead, over RDMA with a round trip of 100 µs; or those of
// the guest of -ram. "ms/1000tasks" is what a host with as many would take.
func BenchmarkPS(b *testing.B) {
	mem, note := listed(b)
	h := &recordedHost{mem: mem}
	h.agreement = &access.Agreement{Host: access.Host{UUID: hostUUID}, Rights: access.Rights{Read: true}, ValidUntil: time.Now().Add(time.Hour)}
	la, lb := roce.NewPipe(netip.AddrPortFrom(monitorAddr, 4791), netip.AddrPortFrom(agentAddr, 4791), 4096, roce.Faults{})
	monitor, err := roce.Open(newFar(la, 50*time.Microsecond), roce.Config{})
	if err != nil {
		b.Fatal(err)
	}
	defer monitor.Close()
	dev, err := roce.Open(newFar(lb, 50*time.Microsecond), roce.Config{})
	if err != nil {
		b.Fatal(err)
	}
	defer dev.Close()
	x := New(Options{Device: dev, Host: h, Authorize: func(string, Right) error { return nil }})
	ctx, stop := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() { done <- x.Run(ctx) }()
	defer func() { stop(); <-done }()
	remote, err := OpenMemory(ctx, monitor, DialLease(monitor, agentAddr, func(_ context.Context, q Request) (Lease, error) {
		q.User = "ops"
		return x.Lease(q)
	}), Request{})
	if err != nil {
		b.Fatal(err)
	}
	defer remote.Close()
	img, err := kernel.Open(ctx, remote, kernel.Options{Hint: kernel.Hint{Note: hostmem.PhysAddr(note)}, NoteOnly: true})
	if err != nil {
		b.Fatal(err)
	}
	tasks, reads := 0, 0
	for b.Loop() {
		v := img.View(ctx)
		for _, err := range v.Tasks() {
			if err != nil {
				b.Fatal(err)
			}
			tasks++
		}
		reads += v.Cost().Reads
	}
	b.ReportMetric(float64(tasks)/float64(b.N), "tasks")
	b.ReportMetric(float64(reads)/float64(b.N), "reads")
	b.ReportMetric(b.Elapsed().Seconds()*1e6/float64(tasks), "ms/1000tasks")
}
