package rxe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/nicfw/roce"
	"github.com/backdoor-rhs/backdoor/nicfw/roce/interop"
)

// TestFaults: over a network that loses, repeats and reorders packets, both ways, a librdmacm client on the kernel's rxe gets every
// byte right, has every atomic operation done once, and is refused what it may not reach.
func TestFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a kernel in QEMU: not with -short")
	}
	verify := filepath.Join(t.TempDir(), "verify")
	if b, err := exec.Command("gcc", "-O2", "-Wall", "-o", verify, "../../nicfw/roce/interop/testdata/verify.c", "-lrdmacm", "-libverbs").CombinedOutput(); err != nil {
		t.Fatalf("build verify.c: %v: %s\nDoes the machine have what make setup installs?", err, b)
	}
	ctx, stop := context.WithTimeout(context.Background(), 8*time.Minute)
	defer stop()
	networks := []roce.Faults{{Seed: 1, Loss: 0.01}, {Seed: 2, Loss: 0.05, Dup: 0.05, Reorder: 0.05}}
	addr := func(i int) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 82, 0, byte(i + 1)}), 24)
	}
	n, err := NewNetwork(addr(0), addr(1))
	if errors.Is(err, unix.EPERM) && os.Geteuid() != 0 {
		t.Skip("a network between this process and a guest takes root")
	} else if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	var devices []*roce.Device
	script := "n=0; while ! ping -c 1 -W 1 10.82.0.1 >/dev/null 2>&1 && [ $n -lt 30 ]; do n=$((n+1)); done\n"
	for i, f := range networks {
		var link roce.Link
		if err := n.Do(func() (err error) {
			link, err = roce.ListenUDP(roce.UDPConfig{Addr: netip.AddrPortFrom(addr(i).Addr(), 0)})
			return err
		}); err != nil {
			t.Fatal(err)
		}
		dev, err := roce.Open(roce.Impair(link, f), roce.Config{})
		if err != nil {
			t.Fatal(err)
		}
		defer dev.Close()
		devices = append(devices, dev)
		mem := roce.NewBuffer(4 << 20)
		if err := interop.Fill(mem, int64(mem.Len())); err != nil {
			t.Fatal(err)
		}
		s := &interop.Server{Device: dev, Region: mem, Length: uint64(mem.Len()), Access: roce.AccessRead | roce.AccessWrite | roce.AccessAtomic,
			Log: slog.New(slog.DiscardHandler)}
		l, err := dev.Listen(roce.ServiceTCP(7175))
		if err != nil {
			t.Fatal(err)
		}
		go dev.Run(ctx)
		go s.ServeMemory(ctx, l)
		script += fmt.Sprintf("verify %v %d 10 && echo result %d ok\n", addr(i).Addr(), i, i)
	}
	var out bytes.Buffer
	g := Guest{Kernel: "6.1-generic", Addr: addr(9), Net: n, Script: script, Programs: map[string]string{"verify": verify}}
	if err := g.Run(ctx, &out); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	for i, f := range networks {
		if !strings.Contains(out.String(), fmt.Sprintf("result %d ok", i)) {
			t.Errorf("%+v: not right:\n%s", f, &out)
		}
		c := devices[i].Counters()
		if c.Duplicates == 0 || c.Replays == 0 {
			t.Errorf("%+v: nothing was asked for again: %v", f, c)
		}
		t.Logf("%+v: %v", f, c)
	}
}
