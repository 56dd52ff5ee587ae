package interop

import (
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
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
	q, va, key, err := DialPerftest(c, d, roce.QPConfig{PathMTU: 1024})
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4000)
	if err := q.Read(ctx, buf, va+800, key); err != nil || binary.LittleEndian.Uint64(buf) != Pattern(100) {
		t.Errorf("read: %v, % x", err, buf[:8])
	}
	// The client tells its record more than once, and reports, and takes the answers for the server's.
	mine := record{16, q.QPN(), q.PSN(), 0, 0, d.Link().LocalAddr().Addr()}.bytes()
	for _, m := range []string{string(mine), string(mine), "done\x00"} {
		c.Write([]byte(m))
		answer := make([]byte, len(m))
		if _, err := io.ReadFull(c, answer); err != nil {
			t.Fatal(err)
		}
		if theirs, err := parseRecord(answer); len(m) == recordLen && (err != nil || theirs.rkey != key || theirs.va != va) {
			t.Errorf("the record that comes again is %q: %v", answer, err)
		}
	}
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
	server := netip.MustParseAddr("10.0.0.2")
	if n, err := CheckMemory(ctx, d, server, 7175); n != 1<<16 || err != nil {
		t.Errorf("CheckMemory = %d, %v", n, err)
	}
	s.Region.(*roce.Buffer).WriteAt([]byte{1}, 40000)
	if _, err := CheckMemory(ctx, d, server, 7175); err == nil {
		t.Error("CheckMemory does not see a wrong byte")
	}
}

func FuzzRecord(f *testing.F) {
	f.Add(record{16, 0x11, 0x123456, 0xdeadbeef, 0x7f0000000000, netip.MustParseAddr("10.0.0.1")}.bytes())
	f.Add([]byte("0:0:10000000:0:0:0:" + strings.Repeat("00:", 16) + "0:")) // wider than a queue pair's number
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := parseRecord(b); err == nil {
			if again, err := parseRecord(r.bytes()); err != nil || again != r {
				t.Fatalf("%+v becomes %+v, %v", r, again, err)
			}
		}
	})
}
