package interop

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"testing"

	"github.com/backdoor-rhs/backdoor/nicfw/roce"
)

// devices returns a client's device and a server at the other end of a pipe.
func devices(t *testing.T) (*roce.Device, *Server) {
	t.Helper()
	la, lb := roce.NewPipe(netip.MustParseAddrPort("10.0.0.1:4791"), netip.MustParseAddrPort("10.0.0.2:4791"), 4096, roce.Faults{})
	var d [2]*roce.Device
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 2)
	for i, l := range []roce.Link{la, lb} {
		var err error
		if d[i], err = roce.Open(l, roce.Config{}); err != nil {
			t.Fatal(err)
		}
		go func() { done <- d[i].Run(ctx) }()
	}
	t.Cleanup(func() {
		stop()
		<-done
		<-done
		d[0].Close()
		d[1].Close()
	})
	mem := roce.NewBuffer(1 << 16)
	if err := Fill(mem, int64(mem.Len())); err != nil {
		t.Fatal(err)
	}
	return d[0], &Server{Device: d[1], Region: mem, Length: 1 << 16, Access: roce.AccessRead | roce.AccessWrite | roce.AccessAtomic, Log: slog.New(slog.DiscardHandler)}
}

func TestRping(t *testing.T) {
	d, s := devices(t)
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	l, err := s.Device.Listen(roce.ServiceTCP(7174))
	if err != nil {
		t.Fatal(err)
	}
	go s.ServeRping(ctx, l)
	if err := Rping(ctx, d, netip.MustParseAddr("10.0.0.2"), 7174, 10); err != nil {
		t.Error(err)
	}
}

// TestPerftest plays the client of perftest's exchange over TCP, then reads.
func TestPerftest(t *testing.T) {
	d, s := devices(t)
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	c, server := net.Pipe()
	go s.perftest(ctx, server)
	say := func(b []byte) []byte {
		c.Write(b)
		answer := make([]byte, len(b))
		if _, err := io.ReadFull(c, answer); err != nil {
			t.Fatal(err)
		}
		return answer
	}
	for _, m := range []string{"6.06\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "\x00\x00\x10\x00", "\x00\x00\x00\x40", "3\x00"} {
		if got := say([]byte(m)); string(got) != m {
			t.Fatalf("%q is answered by %q", m, got)
		}
	}
	q, err := d.NewQP(d.NewPD(), nil, roce.QPConfig{PathMTU: 1024})
	if err != nil {
		t.Fatal(err)
	}
	mine := record{16, q.QPN(), q.PSN(), 0, 0, d.Link().LocalAddr().Addr()}
	theirs, err := parseRecord(say(mine.bytes()))
	if err != nil {
		t.Fatal(err)
	}
	if err := q.Connect(roce.Remote{Addr: theirs.gid, QPN: theirs.qpn, PSN: theirs.psn}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4000)
	if err := q.Read(ctx, buf, theirs.va+800, theirs.rkey); err != nil || binary.LittleEndian.Uint64(buf) != Pattern(100) {
		t.Errorf("read: %v, % x", err, buf[:8])
	}
	if again := say(mine.bytes()); !bytes.Equal(again, theirs.bytes()) {
		t.Errorf("the second record differs: %q", again)
	}
	say([]byte("done\x00"))
	c.Close()
}

func TestMemoryService(t *testing.T) {
	d, s := devices(t)
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	l, err := s.Device.Listen(roce.ServiceTCP(7175))
	if err != nil {
		t.Fatal(err)
	}
	go s.ServeMemory(ctx, l)
	q, private, err := d.Dial(ctx, netip.MustParseAddr("10.0.0.2"), roce.ServiceTCP(7175), d.NewPD(), nil, roce.QPConfig{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	be, word := binary.BigEndian, make([]byte, 8)
	if err := q.Read(ctx, word, be.Uint64(private)+be.Uint64(private[8:])-8, roce.RKey(be.Uint32(private[16:]))); err != nil || binary.LittleEndian.Uint64(word) != Pattern(1<<13-1) {
		t.Errorf("read: %v, % x", err, word)
	}
}

func FuzzRecord(f *testing.F) {
	f.Add(record{16, 0x11, 0x123456, 0xdeadbeef, 0x7f0000000000, netip.MustParseAddr("10.0.0.1")}.bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := parseRecord(b); err == nil {
			if again, err := parseRecord(r.bytes()); len(r.bytes()) == recordLen && (err != nil || again != r) {
				t.Fatalf("%+v becomes %+v, %v", r, again, err)
			}
		}
	})
}
