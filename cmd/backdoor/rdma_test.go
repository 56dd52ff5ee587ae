package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/export"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem/hostmemtest"
	"github.com/backdoor-rhs/backdoor/nicfw/roce"
)

// rdmaHost is the fake agent, with the recorded memory of a real host behind it.
type rdmaHost struct {
	*fakeAgent
	mem   hostmem.Memory
	asked []engine.HealRequest // guarded by fakeAgent.do
	moves bool                 // another plan each time; guarded by fakeAgent.do
}

func (h *rdmaHost) Subscribe(ctx context.Context) <-chan engine.Event { return silence(ctx) }
func (h *rdmaHost) HostMemory() (hostmem.Memory, bool, error)         { return h.mem, true, nil }
func (h *rdmaHost) WritesOn() error                                   { return engine.ErrWritesOff }
func (h *rdmaHost) Heartbeat() kernel.Heartbeat                       { return kernel.Heartbeat{} }
func (h *rdmaHost) Grant() access.Grant {
	a := &access.Agreement{ID: "test", Host: access.Host{UUID: "x"}, Rights: access.Rights{Read: true}, ValidUntil: time.Now().Add(time.Hour)}
	return a.Grant("x", time.Now)
}

func (h *rdmaHost) Heal(ctx context.Context, r engine.HealRequest) (heal.Plan, *heal.Outcome, error) {
	n := 0
	h.do(func() {
		h.asked = append(h.asked, r)
		if h.moves {
			n = len(h.asked)
		}
	})
	if n == 0 {
		return h.fakeAgent.Heal(ctx, r)
	}
	p, _, err := h.fakeAgent.Heal(ctx, engine.HealRequest{Finding: r.Finding, DryRun: true})
	p.Target = &heal.Target{PID: n, TGID: n, Comm: "another"}
	return p, nil, errors.Join(err, p.Agreed(r.Agreed))
}

// silence is a subscription to nothing.
func silence(ctx context.Context) <-chan engine.Event {
	ch := make(chan engine.Event)
	context.AfterFunc(ctx, func() { close(ch) })
	return ch
}

// TestRDMA runs the command against an exporter over loopback: the memory is a real host's, recorded, and the answers must be
// those that the recording itself gives.
func TestRDMA(t *testing.T) {
	files, err := filepath.Glob("../../agent/kernel/testdata/*.hostmem")
	if err != nil || len(files) == 0 {
		t.Fatalf("no recordings: %v", err)
	}
	path := files[0]
	mem, err := hostmem.OpenImage(path)
	if err != nil {
		t.Fatal(err)
	}
	note, err := strconv.ParseUint(mem.(*hostmem.Recording).Labels()["note"], 0, 64)
	if err != nil {
		t.Fatal(err)
	}
	h := &rdmaHost{fakeAgent: newFakeAgent(), mem: mem}
	h.state.Kernel = &kernel.Info{Note: hostmem.PhysAddr(note)}
	agentIP, ourIP := "127.0.0.71", "127.0.0.72"
	link, err := roce.ListenUDP(roce.UDPConfig{Addr: netip.AddrPortFrom(netip.MustParseAddr(agentIP), 0)})
	if err != nil {
		t.Fatal(err)
	}
	dev, err := roce.Open(link, roce.Config{})
	if err != nil {
		t.Fatal(err)
	}
	secret := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, export.KeySize))
	key, err := export.ParseKey("admin", secret)
	if err != nil {
		t.Fatal(err)
	}
	var denied atomic.Value // a string
	denied.Store("")
	x := export.New(export.Options{
		Device: dev, Host: h, Keys: []export.Key{key}, MemoryByKey: true,
		Authorize: func(user string, r export.Right) error {
			if string(r) == denied.Load() {
				return export.ErrDenied
			}
			return nil
		},
	})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- x.Run(ctx) }()
	defer func() { stop(); <-done; dev.Close() }()
	keyFile := filepath.Join(t.TempDir(), "key")
	writeFile(t, keyFile, secret)
	over := []string{"-rdma", agentIP, "-rdma-local", ourIP, "-rdma-key", keyFile}
	ask := func(want int, args ...string) string {
		t.Helper()
		code, stdout, stderr := command(t, append(over[:len(over):len(over)], args...)...)
		if code != want {
			t.Fatalf("%v: exit %d: %s; want %d", args, code, stderr, want)
		}
		return stdout
	}
	var got, want query.Processes
	if err := json.Unmarshal([]byte(ask(exitOK, "ps", "-json")), &got); err != nil {
		t.Fatal(err)
	}
	_, out, _ := command(t, "-image", path, "ps", "-json")
	if err := json.Unmarshal([]byte(out), &want); err != nil {
		t.Fatal(err)
	}
	if len(want.Processes) < 5 {
		t.Fatalf("the recording has %d processes", len(want.Processes))
	}
	if d := cmp.Diff(want.Processes, got.Processes, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("ps by RDMA differs from ps of the recording:\n%s", d)
	}

	ram := mem.Map()[len(mem.Map())-1]
	bytesWant := make([]byte, 100)
	if _, err := mem.ReadAt(bytesWant, int64(note)); err != nil {
		t.Fatal(err)
	}
	if got := ask(exitOK, "read", strconv.FormatUint(note, 10), "100"); got != string(bytesWant) {
		t.Errorf("read % x; want % x", got, bytesWant)
	}
	ask(exitDenied, "read", "0x"+strconv.FormatUint(uint64(ram.End()), 16), "8")
	ask(exitUsage, "read", "here", "8")
	ask(exitUsage, "write", "0x1000", "zz")
	if code, _, stderr := command(t, append(over[:len(over):len(over)], "write", strconv.FormatUint(note, 10), "00", "-y")...); code != exitDenied || !strings.Contains(stderr, "agreement") {
		t.Errorf("write without an agreement for it: exit %d: %s", code, stderr)
	}
	if code, _, _ := command(t, append(over[:len(over):len(over)], "cas", strconv.FormatUint(note&^7, 10), "0", "1", "-y")...); code != exitDenied {
		t.Errorf("cas without an agreement for it: exit %d", code)
	}
	if out := ask(exitIll, "findings"); !strings.Contains(out, h.findings[0].ID) {
		t.Errorf("findings: %s", out)
	}
	if out := ask(exitIll, "watch", "-n", "1"); !strings.Contains(out, h.findings[0].ID) {
		t.Errorf("watch: %s", out)
	}
	ask(exitOK, "heal", h.findings[0].ID, "-dry-run")
	h.do(func() {
		if len(h.asked) != 1 || !h.asked[0].DryRun || h.asked[0].Caller != "admin" {
			t.Errorf("heal asked for %+v", h.asked)
		}
	})
	// A plan is sent and compared before anything is done.
	h.do(func() { h.moves, h.asked = true, nil })
	if code, _, stderr := command(t, append(over[:len(over):len(over)], "heal", h.findings[0].ID, "-y")...); code != exitError || !strings.Contains(stderr, "moved on") {
		t.Errorf("heal of a host that moves on: exit %d: %s", code, stderr)
	}
	h.do(func() {
		if n := len(h.asked); n != 2 || h.asked[1].Agreed == "" {
			t.Errorf("heal asked for %+v", h.asked)
		}
		h.moves, h.asked = false, nil
	})
	if out := ask(exitOK, "heal", h.findings[0].ID, "-y"); !strings.Contains(out, "Repaired and verified") {
		t.Errorf("heal: %s", out)
	}
	h.do(func() {
		if n := len(h.asked); n != 2 || h.asked[n-1].DryRun || h.asked[n-1].Agreed == "" || h.asked[n-1].Action != "kill-process" {
			t.Errorf("heal asked for %+v", h.asked)
		}
	})
	// A value goes with the request, and with what was agreed to.
	h.do(func() { h.asked = nil })
	if out := ask(exitOK, "heal", h.findings[0].ID, "-set", "memory.max=512M", "-y"); !strings.Contains(out, "Repaired and verified") {
		t.Errorf("heal -set: %s", out)
	}
	h.do(func() {
		for _, r := range h.asked {
			if r.Value == nil || *r.Value != (heal.Value{Name: "memory.max", Number: 512 << 20}) {
				t.Errorf("heal asked for %v", r.Value)
			}
		}
		if len(h.asked) != 2 {
			t.Errorf("heal asked for %+v", h.asked)
		}
	})
	ask(exitUsage, "heal", h.findings[0].ID, "-set", "kernel.core_pattern=|/bin/sh", "-y")
	// So is one that takes a repair back.
	if out := ask(exitOK, "undo", "runaway-process-2", "-dry-run"); !strings.Contains(out, "continue-process") {
		t.Errorf("undo -dry-run: %s", out)
	}
	if out := ask(exitOK, "undo", "runaway-process-2", "-y"); !strings.Contains(out, "continue burn (412)") {
		t.Errorf("undo: %s", out)
	}
	ask(exitError, "undo", "none-1", "-y")
	ask(exitOK, "power", "cycle", "-y")
	denied.Store(string(export.RightHeal))
	ask(exitDenied, "heal", h.findings[0].ID, "-dry-run")
	ask(exitDenied, "undo", "runaway-process-2", "-y")
	writeFile(t, keyFile, base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{8}, export.KeySize)))
	ask(exitDenied, "findings")
}

// storeHost is a host whose memory is a RAM file that stores are allowed to.
type storeHost struct {
	*fakeAgent
	mem *hostmem.RAMFile
}

func (h *storeHost) Subscribe(ctx context.Context) <-chan engine.Event { return silence(ctx) }
func (h *storeHost) HostMemory() (hostmem.Memory, bool, error)         { return h.mem, true, nil }
func (h *storeHost) WritesOn() error                                   { return nil }
func (h *storeHost) Heartbeat() kernel.Heartbeat                       { return kernel.Heartbeat{} }
func (h *storeHost) Grant() access.Grant {
	a := &access.Agreement{
		ID: "test", Host: access.Host{UUID: "x"}, Rights: access.Rights{Read: true, Write: true, Memory: []access.Memory{{Size: 1 << 40, Read: true, Write: true, Atomic: true}}},
		ValidUntil: time.Now().Add(time.Hour),
	}
	return a.Grant("x", time.Now)
}

// Store does what the engine does, without its rules.
func (h *storeHost) Store(_ context.Context, r engine.StoreRequest) (heal.Outcome, error) {
	got := make([]byte, len(r.Expect))
	if _, err := h.mem.ReadAt(got, int64(r.Addr)); err != nil {
		return heal.Outcome{}, err
	}
	if !bytes.Equal(got, r.Expect) {
		return heal.Outcome{}, fmt.Errorf("%v: %w", r.Addr, heal.ErrMismatch)
	}
	_, err := h.mem.WriteAt(r.Put, int64(r.Addr))
	return heal.Outcome{Verified: true, Plan: heal.Plan{Title: "Store"}}, err
}

// TestRDMAStores stores by hand and takes it back.
func TestRDMAStores(t *testing.T) {
	dir := t.TempDir()
	layout, size := hostmemtest.Layout(hostmemtest.Map())
	writeFile(t, filepath.Join(dir, "ram"), string(hostmemtest.File(layout, size)))
	mem, err := hostmem.OpenRAMFile(filepath.Join(dir, "ram"), layout, true)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	j, err := journal.OpenFile(filepath.Join(dir, "journal"), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	link, err := roce.ListenUDP(roce.UDPConfig{Addr: netip.MustParseAddrPort("127.0.0.73:0")})
	if err != nil {
		t.Fatal(err)
	}
	dev, err := roce.Open(link, roce.Config{})
	if err != nil {
		t.Fatal(err)
	}
	secret := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, export.KeySize))
	writeFile(t, filepath.Join(dir, "key"), secret)
	key, err := export.ParseKey("admin", secret)
	if err != nil {
		t.Fatal(err)
	}
	x := export.New(export.Options{
		Device: dev, Host: &storeHost{newFakeAgent(), mem}, Journal: j, Keys: []export.Key{key}, MemoryByKey: true,
		Authorize: func(string, export.Right) error { return nil },
	})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- x.Run(ctx) }()
	defer func() { stop(); <-done; dev.Close() }()
	ask := func(want int, args ...string) string {
		t.Helper()
		code, stdout, stderr := command(t, append([]string{"-rdma", "127.0.0.73", "-rdma-local", "127.0.0.74", "-rdma-key", filepath.Join(dir, "key")}, args...)...)
		if code != want {
			t.Fatalf("%v: exit %d: %s%s; want %d", args, code, stdout, stderr, want)
		}
		return stdout
	}
	before := ask(exitOK, "read", "0x8000", "64")
	var did struct{ Records []uint64 }
	var back []string
	for _, args := range [][]string{
		{"write", "0x8003", "0a0b0c0d0e"}, {"cas", "0x8008", fmt.Sprintf("%#x", binary.LittleEndian.Uint64([]byte(before[8:16]))), "0x1122334455667788"}, {"write", "0x8005", "ffff"},
	} {
		if err := json.Unmarshal([]byte(ask(exitOK, append(args, "-y", "-json")...)), &did); err != nil || len(did.Records) != 1 {
			t.Fatalf("%v: records %v, %v", args, did.Records, err)
		}
		back = append([]string{strconv.FormatUint(did.Records[0], 10)}, back...)
	}
	if now := ask(exitOK, "read", "0x8000", "64"); now == before || now[5:8] != "\xff\xff\x0e" {
		t.Errorf("stored, memory is % x", now)
	}
	ask(exitIll, "restore", back[2], "-y") // a later store is in the way
	ask(exitOK, append(append([]string{"restore"}, back...), "-y")...)
	if now := ask(exitOK, "read", "0x8000", "64"); now != before {
		t.Errorf("taken back, memory is % x; was % x", now, before)
	}
	ask(exitIll, "restore", back[0], "-y")
	ask(exitError, "restore", "999999", "-y")
	ask(exitUsage, "restore", "all", "-y")
	ask(exitUsage, "restore")
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
