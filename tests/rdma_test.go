package tests

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/policy"
	"github.com/backdoor-rhs/backdoor/boot/wireguard"
	"github.com/backdoor-rhs/backdoor/images/builder"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/tests/lab"
	"github.com/backdoor-rhs/backdoor/tests/operator"
	"github.com/backdoor-rhs/backdoor/tests/rxe"
)

var (
	rdmaWhole   = flag.Bool("rdma-whole", false, "run all RDMA clients in all their ways, not a choice of them")
	rdmaKernels = flag.String("rdma-kernels", "6.1-generic", "kernels of the RDMA monitor, by comma")
)

// monitor is the third machine of the lab: a stock Debian kernel with rdma_rxe on the wire, whose script says on the console what
// came of each step and waits there to be told to go on.
type monitor struct {
	t     *testing.T
	input *os.File
	done  chan error

	mu   sync.Mutex
	out  bytes.Buffer  // guarded by mu
	news chan struct{} // closed when out grows; guarded by mu
}

func (m *monitor) Write(b []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.out.Write(b)
	close(m.news)
	m.news = make(chan struct{})
	return len(b), nil
}

// wait returns the first match of a pattern in what the monitor has said.
func (m *monitor) wait(ctx context.Context, pattern string) []string {
	m.t.Helper()
	re := regexp.MustCompile(pattern)
	for {
		m.mu.Lock()
		found, news := re.FindStringSubmatch(m.out.String()), m.news
		m.mu.Unlock()
		if found != nil {
			return found
		}
		select {
		case <-news:
		case err := <-m.done:
			m.t.Fatalf("the monitor ended without saying %q: %v\n%s", pattern, err, m.said())
		case <-ctx.Done():
			m.t.Fatalf("the monitor did not say %q: %v\n%s", pattern, ctx.Err(), m.said())
		}
	}
}

func (m *monitor) said() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.out.String()
	return s[max(0, len(s)-6000):]
}

// goOn lets the script go on, and tells it something.
func (m *monitor) goOn(tell string) {
	m.t.Helper()
	if _, err := io.WriteString(m.input, tell+"\n"); err != nil {
		m.t.Fatal(err)
	}
}

// labImage builds the DPU's image with the agent that serves perftest to everybody, which no release image does. It returns the path
// of its files without what tells them apart.
func labImage(t *testing.T) string {
	t.Helper()
	img, err := builder.Lookup("dpu-arm64")
	if err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	if _, err := builder.Build(t.Context(), img, builder.Options{Module: "..", Out: out, Tags: "backdoor_lab"}); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(out, "dpu-arm64")
}

// buildFetch builds the librdmacm client that copies memory.
func buildFetch(t *testing.T) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "fetch")
	if b, err := exec.Command("gcc", "-O2", "-Wall", "-o", out, "../nicfw/roce/interop/testdata/fetch.c", "-lrdmacm", "-libverbs").CombinedOutput(); err != nil {
		t.Fatalf("build fetch.c: %v: %s\nDoes the machine have what make setup installs?", err, b)
	}
	return out
}

func buildCommand(t *testing.T) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "backdoor")
	c := exec.Command("go", "build", "-trimpath", "-o", out, "../cmd/backdoor")
	c.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=amd64")
	if b, err := c.CombinedOutput(); err != nil {
		t.Fatalf("build backdoor: %v: %s", err, b)
	}
	return out
}

// buildTunnel builds the program that makes a tunnel as the image does at boot.
func buildTunnel(t *testing.T) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "tunnel")
	c := exec.Command("go", "build", "-trimpath", "-o", out, "../boot/wireguard/testdata/tunnel")
	c.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=amd64")
	if b, err := c.CombinedOutput(); err != nil {
		t.Fatalf("build tunnel: %v: %s", err, b)
	}
	return out
}

// steps are the RDMA clients that the monitor runs against the DPU, by name: the host's memory is on port 18515, scratch memory on
// 18516.
func steps(whole bool) string {
	v4, v6 := lab.DPUWireAddress.Addr(), lab.DPUWireAddress6.Addr()
	var b strings.Builder
	try := func(name, format string, a ...any) { fmt.Fprintf(&b, "try "+name+" "+format+"\n", a...) }
	try("read_lat", "ib_read_lat -F -n 100 -p 18515 %v", v4)
	try("read_bw", "ib_read_bw -F -s 65536 -n 60 -p 18515 %v", v4)
	try("write_bw", "ib_write_bw -F -s 65536 -n 60 -p 18516 %v", v4)
	try("fetch_add", "ib_atomic_lat -F -A FETCH_AND_ADD -n 100 -p 18516 %v", v4)
	try("cmp_swap_cm", "ib_atomic_lat -R -F -A CMP_AND_SWAP -n 100 -p 18516 %v", v4)
	try("read_bw_cm_1024", "ib_read_bw -R -F -m 1024 -s 65536 -n 40 -p 18515 %v", v4)
	try("rping", "rping -c -a %v -p 7174 -C 10", v4)
	// perftest 4.5 finds its server by IPv4, and reaches memory by IPv6 if its GID is one of that.
	b.WriteString("g=$(grep -l fd00:00bd /sys/class/infiniband/rxe0/ports/1/gids/*)\ng=${g##*/}\n")
	try("read_lat_v6", "ib_read_lat -F -x $g -n 50 -p 18615 %v", v4)
	try("rping_v6", "rping -c -a %v -p 7174 -C 10", v6)
	fmt.Fprintf(&b, "rping -s -a 0.0.0.0 -p 7174 -C 10 >/out 2>&1 & back=$!\nsleep 1\nrping -c -a %v -p 7176 -C 1 >/dev/null 2>&1\nif wait $back; then echo result rping_back ok; else echo result rping_back failed; cat /out; fi\n", v4)
	if !whole {
		return b.String()
	}
	for _, mtu := range []int{1024, 4096} {
		try(fmt.Sprintf("read_all_%d", mtu), "ib_read_bw -F -a -n 5 -m %d -p 18515 %v", mtu, v4)
		try(fmt.Sprintf("write_all_%d", mtu), "ib_write_bw -F -a -n 5 -m %d -p 18516 %v", mtu, v4)
		try(fmt.Sprintf("read_lat_%d", mtu), "ib_read_lat -F -s 4096 -n 50 -m %d -p 18515 %v", mtu, v4)
	}
	try("cm_read_lat", "ib_read_lat -R -F -n 50 -p 18515 %v", v4)
	try("cm_read_bw", "ib_read_bw -R -F -s 65536 -n 40 -p 18515 %v", v4)
	try("cm_write_bw", "ib_write_bw -R -F -s 65536 -n 40 -p 18516 %v", v4)
	try("cm_fetch_add", "ib_atomic_lat -R -F -A FETCH_AND_ADD -n 50 -p 18516 %v", v4)
	try("read_all_v6", "ib_read_bw -F -x $g -a -n 5 -p 18615 %v", v4)
	try("write_all_v6", "ib_write_bw -F -x $g -a -n 5 -m 1024 -p 18616 %v", v4)
	try("fetch_add_v6", "ib_atomic_lat -F -x $g -A FETCH_AND_ADD -n 50 -p 18616 %v", v4)
	try("cmp_swap_v6", "ib_atomic_lat -F -x $g -A CMP_AND_SWAP -n 50 -p 18616 %v", v4)
	try("cmp_swap", "ib_atomic_lat -F -A CMP_AND_SWAP -n 100 -p 18516 %v", v4)
	fmt.Fprintf(&b, "rping -s -a :: -p 7174 -C 10 >/out 2>&1 & back=$!\nsleep 1\nrping -c -a %v -p 7176 -C 1 >/dev/null 2>&1\nif wait $back; then echo result rping_back_v6 ok; else echo result rping_back_v6 failed; cat /out; fi\n", v6)
	return b.String()
}

// pieces of the host's RAM that are compared byte by byte, start and length; the second begins and ends at odd addresses.
var pieces = [][2]uint64{{16 << 20, 24 << 20}, {0x1234567, 3000001}}

// TestRDMA: unmodified RDMA programs on a stock kernel reach the host's memory through the DPU, while the host runs, stands still and is
// dead; what they read is what is in its RAM file; and the operator's command does its work over the same wire, through the tunnel that
// policy demands for it and that the DPU has made at boot: it looks, stores and takes that back, stops a process and takes that back, and
// switches the host off and on.
func TestRDMA(t *testing.T) {
	needLab(t)
	image := labImage(t)
	programs := map[string]string{"fetch": buildFetch(t), "backdoor": buildCommand(t), "tunnel": buildTunnel(t)}
	for kernel := range strings.SplitSeq(*rdmaKernels, ",") {
		t.Run(kernel, func(t *testing.T) { testRDMA(t, kernel, image, programs) })
	}
}

func testRDMA(t *testing.T, kernel, image string, programs map[string]string) {
	limit := 10 * time.Minute
	if *rdmaWhole {
		limit = 25 * time.Minute
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), limit, fmt.Errorf("not within %v", limit))
	defer cancel()
	keyFile := filepath.Join(t.TempDir(), "key")
	monitorKey, err := wireguard.LoadKey(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	rules := policy.Default()
	rules.Detectors.RunawayFor, rules.Detectors.RunawayShare = policy.Duration(3*time.Second), 0.3
	soon, err := json.Marshal(rules)
	if err != nil {
		t.Fatal(err)
	}
	l, err := lab.Up(ctx, lab.Config{DPUImage: image + ".cpio.zst", DPUKernel: image + ".vmlinuz", Tunnel: monitorKey.Public(), Policy: soon})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	o, err := operator.DialDPU(ctx, l.DPU)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.WaitAttached(ctx, 1); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(l.DPU.StateDir, "rdma-key"))
	if err != nil {
		t.Fatal(err)
	}
	memoryKey, err := os.ReadFile(filepath.Join(l.DPU.StateDir, "rdma-memory-key"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.Post(ctx, "/redfish/v1/AccountService/Roles", map[string]any{
		"RoleId": "Memory", "AssignedPrivileges": []string{"Login", "ConfigureComponents", "ConfigureSelf"}, "OemPrivileges": []string{"BackdoorMemory"},
	}, nil); err != nil {
		t.Fatal(err)
	}
	account := map[string]any{"UserName": "memory", "Password": "a long password 1", "RoleId": "Memory"}
	if _, err := o.Post(ctx, "/redfish/v1/AccountService/Accounts", account, nil); err != nil {
		t.Fatal(err)
	}
	dpuKey, err := wireguard.LoadKey(filepath.Join(l.DPU.StateDir, "tunnel-key"))
	if err != nil {
		t.Fatal(err)
	}
	tunnel, err := json.Marshal(wireguard.Config{
		Name: "wg0", PrivateKeyFile: "/wg-key", Addresses: []netip.Prefix{lab.MonitorTunnelAddress},
		Peers: []wireguard.Peer{{
			PublicKey: dpuKey.Public(), AllowedIPs: []netip.Prefix{netip.PrefixFrom(lab.DPUTunnelAddress.Addr(), 32)},
			Endpoint: netip.AddrPortFrom(lab.DPUWireAddress.Addr(), lab.TunnelPort),
		}},
	})
	if err != nil {
		t.Fatal(err)
	}

	var sums strings.Builder
	for _, p := range pieces {
		fmt.Fprintf(&sums, "sum=$(fetch %v %d %d | sha256sum) && echo \"sum %d ${sum%%%% *}\"\n", lab.DPUWireAddress.Addr(), p[0], p[1], p[0])
	}
	_, size := l.Host.RAM()
	place := size/2 + 0x120 // somewhere in RAM: what is there is put back while the host stands still
	dpu := lab.DPUWireAddress.Addr()
	script := `try() { name=$1; shift; if "$@" >/out 2>&1; then echo "result $name ok"; else echo "result $name failed"; cat /out; fi; }
pause() { echo "phase $1"; read x </dev/ttyS0; }
# The command needs the UDP port that rxe holds.
rxe_off() { rdma link delete rxe0; rmmod rdma_rxe; }
rxe_on() {
	insmod /modules/*-rdma_rxe.ko
	rdma link add rxe0 type rxe netdev eth0
	n=0; while ! [ -c /dev/infiniband/uverbs0 ] && [ $n -lt 200 ]; do sleep 0.05; n=$((n+1)); done
}
record() { sed -n 's/.*take it back with: restore //p' /out; }
ip -6 addr add fd00:bd::3/64 dev eth0
n=0; while ! ping -6 -c 1 -W 1 ` + lab.DPUWireAddress6.Addr().String() + ` >/dev/null 2>&1 && [ $n -lt 30 ]; do n=$((n+1)); done
n=0; while ! ping -c 1 -W 1 ` + dpu.String() + ` >/dev/null 2>&1 && [ $n -lt 30 ]; do n=$((n+1)); done
` + steps(*rdmaWhole) + `
pause running
` + sums.String() + `
rxe_off
echo '` + strings.TrimSpace(string(key)) + `' >/key
echo '` + strings.TrimSpace(string(memoryKey)) + `' >/memory-key
b="backdoor -rdma-key /key -timeout 60s -rdma ` + dpu.String() + `"
try cli_outside_refused sh -c "$b findings >/out2 2>&1; [ \$? = 5 ] && grep rdma.encrypted /out2"
try tunnel tunnel /wg0.json
b="backdoor -rdma-key /key -timeout 60s -rdma ` + lab.DPUTunnelAddress.Addr().String() + `"
m="backdoor -user memory -rdma-key /memory-key -timeout 60s -rdma ` + lab.DPUTunnelAddress.Addr().String() + `"
pause still
try cli_write $m write ` + fmt.Sprintf("%#x", place+3) + ` 0a0b0c0d0e -y
written=$(record)
try cli_cas $m cas ` + fmt.Sprintf("%#x", place+8) + ` $x 0x1122334455667788 -y
swapped=$(record)
pause stored
try cli_restore $m restore $swapped $written -y
pause restored
try cli_heal $b heal $x -action stop-process -y
finding=$x
pause stopped
try cli_undo $b undo $finding -y
rxe_on
pause continued
try dead_lat ib_read_lat -F -n 50 -p 18515 ` + dpu.String() + `
try dead_bw ib_read_bw -F -s 65536 -n 40 -p 18515 ` + dpu.String() + `
` + sums.String() + `
rxe_off
try cli_status_3 sh -c "$b status; [ \$? = 3 ]"
try cli_ps sh -c "$b ps | grep -q init"
try cli_dmesg sh -c "$b dmesg | grep -q 'Kernel panic'"
try cli_findings sh -c "$b findings | grep -q panic"
try cli_watch sh -c "$b watch -n 1 | grep -q 'kernel is dead'"
try cli_dry_run sh -c "$b heal panic-1 -action power-cycle -dry-run"
try cli_write_refused sh -c "$b write 0x1000000 00 -y; [ \$? = 5 ]"
try cli_cycle $b power cycle -y
try tunnel_used sh -c "tunnel -state wg0 | grep 'handshake true'"
pause end
`
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	port, far, err := l.Wire.Socket("monitor")
	if err != nil {
		t.Fatal(err)
	}
	defer port.Close()
	m := &monitor{t: t, input: w, done: make(chan error, 1), news: make(chan struct{})}
	g := rxe.Guest{Kernel: kernel, Addr: netip.MustParsePrefix("192.168.190.3/24"), Port: far, Input: r, Script: script,
		Programs: programs, Modules: []string{"wireguard"}, Files: map[string]string{"/wg0.json": string(tunnel), "/wg-key": monitorKey.String()}}
	guest, halt := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		m.done <- g.Run(guest, m)
	}()
	defer func() { halt(); <-ended; far.Close(); r.Close() }()

	m.wait(ctx, `phase running`)
	if err := l.Host.Freeze(ctx); err != nil {
		t.Fatal(err)
	}
	m.goOn("")
	m.wait(ctx, `phase still`)
	m.sums(l, 0)
	// What is stored by RDMA is in the RAM file, and nothing of it is left when it was taken back.
	before := m.ram(l, place, 32)
	word := binary.LittleEndian.Uint64(before[8:])
	m.goOn(fmt.Sprintf("%#x", word))
	m.wait(ctx, `phase stored`)
	want := bytes.Clone(before)
	copy(want[3:], []byte{10, 11, 12, 13, 14})
	binary.LittleEndian.PutUint64(want[8:], 0x1122334455667788)
	if got := m.ram(l, place, 32); !bytes.Equal(got, want) {
		t.Errorf("after write and cas the RAM file has % x; want % x; before it had % x", got, want, before)
	}
	m.goOn("")
	m.wait(ctx, `phase restored`)
	if got := m.ram(l, place, 32); !bytes.Equal(got, before) {
		t.Errorf("after restore the RAM file has % x; want % x", got, before)
	}
	if err := l.Host.Thaw(ctx); err != nil {
		t.Fatal(err)
	}
	// A process is stopped and, when that is taken back, goes on.
	runaway, err := l.Host.Fault(ctx, lab.FaultRunaway)
	if err != nil {
		t.Fatal(err)
	}
	now := func() string {
		all, err := l.Host.PS(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range all {
			if p.PID == runaway.PID {
				return p.State
			}
		}
		return "gone"
	}
	f, err := o.WaitFinding(ctx, func(f detect.Finding) bool {
		return f.Kind == detect.KindRunawayProcess && f.Culprit.TGID == runaway.PID
	})
	if err != nil {
		t.Fatal(err)
	}
	m.goOn(f.ID)
	m.wait(ctx, `phase stopped`)
	if s := now(); s != "T" {
		t.Errorf("process %d, stopped by an order over RDMA, has state %q; want T", runaway.PID, s)
	}
	m.goOn("")
	m.wait(ctx, `phase continued`)
	if s := now(); s != "R" && s != "S" {
		t.Errorf("process %d, whose stop was taken back over RDMA, has state %q; want R", runaway.PID, s)
	}
	if _, err := l.Host.Fault(ctx, lab.FaultPanic); err != nil {
		t.Fatal(err)
	}
	// Its last words are out, but its CPUs still spin: with the machine stopped its memory holds still, too.
	if _, err := o.WaitState(ctx, "the host to be dead", func(s engine.State) bool { return s.Dead }); err != nil {
		t.Fatal(err)
	}
	if err := l.Host.Freeze(ctx); err != nil {
		t.Fatal(err)
	}
	boots := l.Host.Boots()
	m.goOn("")
	m.wait(ctx, `result cli_write_refused`)
	m.sums(l, len(pieces))
	if err := l.Host.Thaw(ctx); err != nil {
		t.Fatal(err)
	}
	m.wait(ctx, `phase end`)
	if _, err := l.Host.WaitBoot(ctx, boots); err != nil {
		t.Errorf("the host was not restarted by the order over RDMA: %v", err)
	}
	m.results()
	// Nobody had a lease but by the key, and what was done is in the journal.
	c, err := l.DPU.Redfish()
	if err != nil {
		t.Fatal(err)
	}
	var state struct {
		RDMA struct {
			Counters []struct {
				Name  string
				Value uint64
			}
		}
	}
	if err := c.Get(ctx, client.RDMAURI, &state); err != nil {
		t.Fatal(err)
	}
	for _, k := range state.RDMA.Counters {
		if k.Name == "BadICRC" && k.Value != 0 {
			t.Errorf("%d packets with a wrong ICRC", k.Value)
		}
	}
	m.goOn("")
}

// results complains about each step that failed, and about those that are missing.
func (m *monitor) results() {
	m.t.Helper()
	m.mu.Lock()
	out := m.out.String()
	m.mu.Unlock()
	n := 0
	for _, r := range regexp.MustCompile(`result (\S+) (\S+)`).FindAllStringSubmatch(out, -1) {
		n++
		if r[2] != "ok" {
			m.t.Errorf("%s: %s", r[1], r[2])
		}
	}
	want := strings.Count(steps(*rdmaWhole), "try ") + strings.Count(steps(*rdmaWhole), " & back=$!") + 2 + 16
	if n != want {
		m.t.Errorf("%d steps said how they ended; want %d", n, want)
	}
	if m.t.Failed() {
		m.t.Logf("the monitor said\n%s", out)
	}
}

// ram returns bytes of the RAM file.
func (m *monitor) ram(l *lab.Lab, at int64, n int) []byte {
	m.t.Helper()
	path, _ := l.Host.RAM()
	f, err := os.Open(path)
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := f.ReadAt(b, at); err != nil {
		m.t.Fatal(err)
	}
	return b
}

// sums holds what the librdmacm client read, from the given answer on, against the RAM file.
func (m *monitor) sums(l *lab.Lab, from int) {
	m.t.Helper()
	m.mu.Lock()
	got := regexp.MustCompile(`sum (\d+) ([0-9a-f]{64})`).FindAllStringSubmatch(m.out.String(), -1)
	m.mu.Unlock()
	if len(got) != from+len(pieces) {
		m.t.Fatalf("%d sums; want %d\n%s", len(got), from+len(pieces), m.said())
	}
	path, _ := l.Host.RAM()
	f, err := os.Open(path)
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	for i, p := range pieces {
		h := sha256.New()
		if _, err := io.Copy(h, io.NewSectionReader(f, int64(p[0]), int64(p[1]))); err != nil {
			m.t.Fatal(err)
		}
		if want := hex.EncodeToString(h.Sum(nil)); got[from+i][2] != want || got[from+i][1] != fmt.Sprint(p[0]) {
			m.t.Errorf("%d bytes at %#x that the monitor read have SHA-256 %s; the RAM file has %s", p[1], p[0], got[from+i][2], want)
		}
	}
}
