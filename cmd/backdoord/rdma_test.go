package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/export"
	"github.com/backdoor-rhs/backdoor/cmd/backdoord/config"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem/hostmemtest"
	"github.com/backdoor-rhs/backdoor/nicfw/roce"
	"github.com/backdoor-rhs/backdoor/redfish/client"
)

// TestRDMA has a whole agent, as a process, lend its host's memory over Redfish and read it by RDMA over loopback.
func TestRDMA(t *testing.T) {
	dir := t.TempDir()
	const size = 1 << 20
	ram := make([]byte, size)
	hostmemtest.Fill(ram, 0)
	write(t, filepath.Join(dir, "ram"), string(ram))
	const uuid = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"
	public, owner, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, ops, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := access.Agreement{
		Version: access.Version, ID: "test", Host: access.Host{UUID: uuid, Name: "host"}, Owner: access.Party{Name: "owner", Key: access.Key(public)},
		Monitors: []access.Party{{Name: "ops", Key: access.Key(ops.Public().(ed25519.PublicKey))}}, Rights: access.Rights{Read: true, Actions: []string{}},
		Protected: []access.Protected{}, ValidFrom: time.Now().Add(-time.Hour).UTC().Truncate(time.Second), ValidUntil: time.Now().Add(time.Hour).UTC().Truncate(time.Second),
	}
	for _, k := range []ed25519.PrivateKey{owner, ops} {
		if err := a.Sign(k); err != nil {
			t.Fatal(err)
		}
	}
	doc, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "agreement.json"), string(doc))
	secret := make([]byte, export.KeySize)
	rand.Read(secret)
	write(t, filepath.Join(dir, "admin.key"), base64.StdEncoding.EncodeToString(secret)+"\n")
	addr := freePort(t)
	agentIP, ourIP := netip.MustParseAddr("127.0.0.61"), netip.MustParseAddr("127.0.0.62")
	c := config.Config{
		Memory:   config.Memory{Backend: config.BackendRAMFile, Path: "ram", Layout: config.Layout{Name: config.LayoutFlat}, Size: size},
		HostUUID: uuid, StateDir: "state", Agreement: config.Agreement{File: "agreement.json", OwnerKey: config.Key(public)},
		Redfish: config.Redfish{Listen: addr}, RDMA: config.RDMA{Addresses: []netip.Addr{agentIP}, Keys: []config.RDMAKey{{User: "admin", File: "admin.key"}}},
	}
	if err := os.Mkdir(filepath.Join(dir, "state"), 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "config.json")
	if err := c.Write(path); err != nil {
		t.Fatal(err)
	}
	_, out := start(t, "-config", path)
	started, _ := out.wait(t, 0, `worker started" pid=(\d+)`)
	cl := login(t, out, addr)
	out.wait(t, 0, `RDMA is served`)
	t.Run("interface", func(t *testing.T) {
		worker, err := strconv.Atoi(started[1])
		if err != nil {
			t.Fatal(err)
		}
		if got := boundTo(t, worker, netip.AddrPortFrom(agentIP, roce.Port)); got != "lo" {
			t.Errorf("the socket at %v takes what comes by interface %q; want lo alone", agentIP, got)
		}
	})

	link, err := roce.ListenUDP(roce.UDPConfig{Addr: netip.AddrPortFrom(ourIP, 0)})
	if err != nil {
		t.Fatal(err)
	}
	dev, err := roce.Open(link, roce.Config{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- dev.Run(ctx) }()
	defer func() { stop(); <-done; dev.Close() }()
	var lease client.RDMALease
	redfish := export.DialLease(dev, agentIP, func(ctx context.Context, r export.Request) (l export.Lease, err error) {
		lease, err = cl.LeaseRDMA(ctx, client.RDMARequest{Kind: r.Kind.String(), Peer: r.Peer.String(), QPN: uint32(r.QPN), PSN: uint32(r.PSN), PathMTU: r.PathMTU})
		if err != nil {
			return l, err
		}
		start, err1 := strconv.ParseUint(lease.Start, 0, 64)
		length, err2 := strconv.ParseUint(lease.Length, 0, 64)
		return export.Lease{
			QPN: roce.QPN(lease.QPN), PSN: roce.PSN(lease.PSN), PathMTU: lease.PathMTU, RKey: roce.RKey(lease.RKey), Addr: start, Length: length,
			MapKey: roce.RKey(lease.MapKey), MapLength: uint64(lease.MapLength),
		}, errors.Join(err1, err2)
	})
	// The engine opens the memory a moment after its start.
	var mem hostmem.Memory
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if mem, err = export.OpenMemory(t.Context(), dev, redfish, export.Request{}); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	defer mem.Close()
	got := make([]byte, size)
	if _, err := mem.ReadAt(got, 0); err != nil || !bytes.Equal(got, ram) {
		t.Errorf("the host's memory by RDMA: %v, equal %v", err, bytes.Equal(got, ram))
	}
	if err := cl.RevokeRDMA(t.Context(), lease.ID); err != nil {
		t.Error(err)
	}

	key, err := export.ParseKey("admin", base64.StdEncoding.EncodeToString(secret))
	if err != nil {
		t.Fatal(err)
	}
	byKey := export.DialKey(dev, agentIP, key)
	p := export.NewPoller(dev, byKey)
	defer p.Close()
	if h, err := p.Health(t.Context()); err != nil || h.Verdict != export.CouldNotTell {
		t.Errorf("health %+v, %v", h, err)
	}
	acts, err := export.OpenActions(t.Context(), dev, byKey)
	if err != nil {
		t.Fatal(err)
	}
	defer acts.Close()
	var st engine.State
	if err := acts.Do(t.Context(), export.OpState, nil, &st, nil); err != nil || st.Agreement == nil || st.Agreement.ID != "test" {
		t.Errorf("state %+v, %v", st, err)
	}
	var denied *export.ActionError
	if err := acts.Do(t.Context(), export.OpPower, export.PowerRequest{Op: "cycle"}, nil, nil); !errors.As(err, &denied) || denied.Code != "denied" {
		t.Errorf("power without writes and right: %v; want it denied", err)
	}
	if _, err := export.OpenMemory(t.Context(), dev, byKey, export.Request{}); !errors.Is(err, export.ErrDenied) {
		t.Errorf("memory by key, against the policy: %v", err)
	}

	var state struct {
		RDMA struct {
			Addresses []string
			Leases    []struct{ User, Kind string }
			Counters  []struct {
				Name  string
				Value uint64
			}
		}
	}
	if err := cl.Get(t.Context(), client.RDMAURI, &state); err != nil || fmt.Sprint(state.RDMA.Addresses) != "[127.0.0.61]" || len(state.RDMA.Leases) < 2 || len(state.RDMA.Counters) < 20 {
		t.Errorf("state of RDMA %+v, %v", state, err)
	}
	journal, err := os.ReadFile(filepath.Join(dir, "state", "journal"))
	if err != nil || !strings.Contains(string(journal), `"uri":"rdma:lease"`) || !strings.Contains(string(journal), `"uri":"rdma:power"`) {
		t.Errorf("the journal does not say what was done by RDMA: %v", err)
	}
}

// A key file that is not there, or no key, is a problem of the configuration, and the agent starts without.
func TestRDMAKeys(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "short"), "AAAA")
	for _, name := range []string{"short", "none"} {
		c := config.Config{RDMA: config.RDMA{Keys: []config.RDMAKey{{User: "ops", File: filepath.Join(dir, name)}}}}
		if keys, err := loadKeys(c.RDMA); err == nil || keys != nil || !strings.Contains(err.Error(), name) {
			t.Errorf("loadKeys(%s) = %v, %v", name, keys, err)
		}
	}
}

// boundTo returns the interface that a process's UDP socket keeps to, empty if to none.
func boundTo(t *testing.T, pid int, addr netip.AddrPort) string {
	t.Helper()
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(process)
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		n, err := strconv.Atoi(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.PidfdGetfd(process, n, 0)
		if errors.Is(err, unix.EPERM) && os.Geteuid() != 0 {
			t.Skip("this system does not let a test that is not root look at the sockets of a process that it started")
		} else if errors.Is(err, unix.EPERM) {
			t.Fatal(err)
		} else if err != nil {
			continue // closed meanwhile
		}
		defer unix.Close(fd)
		name, _ := unix.Getsockname(fd)
		if a, ok := name.(*unix.SockaddrInet4); ok && netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)) == addr {
			bound, err := unix.GetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE)
			if err != nil {
				t.Fatal(err)
			}
			return bound
		}
	}
	t.Fatalf("process %d has no socket at %v", pid, addr)
	return ""
}
