package rxe

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/nicfw/roce"
	"github.com/backdoor-rhs/backdoor/nicfw/roce/interop"
)

func buildPeer(t testing.TB) string {
	t.Helper()
	out, err := BuildPeer(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestVerbsTarget: in a guest, the kernel's verbs device serves our memory to unmodified perftest clients, which read,
// write and do atomic operations, on both kernels.
func TestVerbsTarget(t *testing.T) {
	if testing.Short() {
		t.Skip("boots kernels in QEMU: not with -short")
	}
	peer := buildPeer(t)
	for _, kernel := range []string{"6.1-generic", "6.12-generic"} {
		t.Run(kernel, func(t *testing.T) {
			ctx, stop := context.WithTimeout(context.Background(), 3*time.Minute)
			defer stop()
			var out bytes.Buffer
			g := Guest{Kernel: kernel, Addr: netip.MustParsePrefix("10.78.0.2/24"), Programs: map[string]string{"rxepeer": peer},
				Script: `rxepeer -uverbs -addr 10.78.0.2 -size 1048576 2>/log &
n=0; while ! netstat -ltn | grep -q :18515 && [ $n -lt 100 ]; do sleep 0.1; n=$((n+1)); done
try() { name=$1; shift; if "$@" >/out 2>&1; then echo "result $name ok"; else echo "result $name failed"; cat /out; fi; }
try read_lat ib_read_lat -F -n 200 10.78.0.2
try read_lat_1024 ib_read_lat -F -m 1024 -s 4096 -n 100 10.78.0.2
try read_bw ib_read_bw -F -s 65536 -n 200 10.78.0.2
try write_bw ib_write_bw -F -s 65536 -n 200 10.78.0.2
try fetch_add ib_atomic_lat -F -A FETCH_AND_ADD -n 200 10.78.0.2
try cmp_swap ib_atomic_lat -F -A CMP_AND_SWAP -n 200 10.78.0.2
cat /log
`}
			if err := g.Run(ctx, &out); err != nil {
				t.Fatalf("%v\n%s", err, &out)
			}
			var got []string
			for l := range strings.Lines(out.String()) {
				if _, r, ok := strings.Cut(strings.TrimSpace(l), "result "); ok {
					got = append(got, r)
				}
			}
			if want := []string{"read_lat ok", "read_lat_1024 ok", "read_bw ok", "write_bw ok", "fetch_add ok", "cmp_swap ok"}; !slices.Equal(got, want) {
				t.Errorf("got %q; want %q\n%s", got, want, &out)
			}
		})
	}
}

// TestVerbsMemory: what our own requester reads from a verbs device that serves our memory is that memory, byte by byte;
// what it writes and adds arrives there once; what it may not reach is refused.
func TestVerbsMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("boots kernels in QEMU: not with -short")
	}
	ctx, stop := context.WithTimeout(context.Background(), 2*time.Minute)
	defer stop()
	n, err := NewNetwork(netip.MustParsePrefix("10.78.0.1/24"))
	if errors.Is(err, unix.EPERM) {
		t.Skip("a network between this process and a guest takes root")
	} else if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	const size = 1 << 20
	var console bytes.Buffer
	guest := make(chan error, 1)
	guestCtx, halt := context.WithCancel(ctx)
	defer func() { halt(); <-guest }()
	g := Guest{Kernel: "6.1-generic", Addr: netip.MustParsePrefix("10.78.0.2/24"), Net: n, Programs: map[string]string{"rxepeer": buildPeer(t)},
		Script: "rxepeer -uverbs -addr 10.78.0.2 -size 1048576"}
	go func() { guest <- g.Run(guestCtx, &console) }()

	var dev *roce.Device
	if err := n.Do(func() error {
		link, err := roce.ListenUDP(roce.UDPConfig{Addr: netip.MustParseAddrPort("10.78.0.1:0")})
		if err == nil {
			dev, err = roce.Open(link, roce.Config{})
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	dial := func() (*roce.QP, uint64, roce.RKey) {
		t.Helper()
		var c net.Conn
		for c == nil {
			if err := n.Do(func() (err error) {
				c, err = net.DialTimeout("tcp", "10.78.0.2:18515", time.Second)
				return err
			}); err != nil && ctx.Err() != nil {
				halt()
				guest <- <-guest // its console is complete
				t.Fatalf("%v\n%s", err, &console)
			} else if err != nil {
				time.Sleep(100 * time.Millisecond) // it boots
			}
		}
		t.Cleanup(func() { c.Close() })
		q, va, key, err := interop.DialPerftest(c, dev, roce.QPConfig{PathMTU: 4096, MaxReads: 4})
		if err != nil {
			t.Fatal(err)
		}
		return q, va, key
	}
	q, va, key := dial()
	got := make([]byte, size)
	if err := q.Read(ctx, got, va, key); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < size; i += 8 {
		if v := binary.LittleEndian.Uint64(got[i:]); v != interop.Pattern(uint64(i/8)) {
			t.Fatalf("word %d is %#x; want %#x", i/8, v, interop.Pattern(uint64(i/8)))
		}
	}
	want := bytes.Repeat([]byte("backdoor"), 10000)
	if err := errors.Join(q.Write(ctx, want, va+4096+3, key), q.Read(ctx, got[:len(want)], va+4096+3, key)); err != nil || !bytes.Equal(got[:len(want)], want) {
		t.Errorf("what was written is not read: %v", err)
	}
	for i := range uint64(10) {
		if prev, err := q.FetchAdd(ctx, va+8, key, 1); err != nil || prev != interop.Pattern(1)+i {
			t.Errorf("fetch and add %d found %#x, %v", i, prev, err)
		}
	}
	for _, bad := range []struct {
		name string
		va   uint64
		key  func(roce.RKey) roce.RKey
	}{
		{"one byte past the end", va + size - 7, func(k roce.RKey) roce.RKey { return k }},
		{"before the start", va - 8, func(k roce.RKey) roce.RKey { return k }},
		{"a wrong key", va, func(k roce.RKey) roce.RKey { return k ^ 1 }},
	} {
		q, _, key := dial() // a refusal ends the queue pair
		var nak *roce.NAKError
		if err := q.Read(ctx, got[:8], bad.va, bad.key(key)); !errors.As(err, &nak) || nak.Syndrome != roce.NAKRemoteAccess {
			t.Errorf("%s: %v; want a remote access error", bad.name, err)
		}
	}
}
