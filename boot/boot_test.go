package boot

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/backdoor-rhs/backdoor/boot/early"
	"github.com/vishvananda/netlink"
)

func TestConfigValidate(t *testing.T) {
	for _, tt := range []struct {
		name string
		json string
		want string // part of the error; empty: none
	}{
		{"zero", `{}`, ""},
		{"full", `{"hostname":"dpu0","interfaces":[{"match":"eth0","dhcp":true},{"match":"52:54:00:00:00:02","addresses":["192.168.77.2/24","fd00::2/64"],"gateway":"192.168.77.1","mtu":9000}],"nameServers":["10.0.2.3"],"watchdogSeconds":-1}`, ""},
		{"no match", `{"interfaces":[{"dhcp":true}]}`, "match is empty"},
		{"twice", `{"interfaces":[{"match":"eth0"},{"match":"ETH0"}]}`, "there twice"},
		{"long name", `{"interfaces":[{"match":"enp0s31f6-to-the-host"}]}`, "neither"},
		{"small MTU", `{"interfaces":[{"match":"eth0","mtu":67}]}`, "mtu 67"},
		{"watchdog", `{"watchdogSeconds":-2}`, "watchdogSeconds -2"},
		{"hostname", `{"hostname":"a b"}`, "hostname"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var c Config
			d := json.NewDecoder(strings.NewReader(tt.json))
			d.DisallowUnknownFields()
			if err := d.Decode(&c); err != nil {
				t.Fatal(err)
			}
			err := c.Validate()
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Validate() = %v; want %q", err, tt.want)
			}
			again, err := json.Marshal(c)
			if err != nil {
				t.Fatal(err)
			}
			var c2 Config
			if err := json.Unmarshal(again, &c2); err != nil {
				t.Errorf("%s does not read back: %v", again, err)
			}
			if diff := cmp.Diff(c, c2, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
				t.Errorf("JSON round trip (-before +after):\n%s", diff)
			}
		})
	}
}

// superblock makes a device with an ext4 superblock.
func superblock(label string) []byte {
	b := make([]byte, superblockOffset+superblockSize)
	binary.LittleEndian.PutUint16(b[superblockOffset+0x38:], 0xef53)
	copy(b[superblockOffset+0x78:superblockOffset+0x88], label)
	return b
}

func TestReadExt4(t *testing.T) {
	for _, tt := range []struct {
		name  string
		dev   []byte
		label string
		err   error
	}{
		{"ours", superblock(StateLabel), StateLabel, nil},
		{"no label", superblock(""), "", nil},
		{"label without a NUL", superblock("0123456789abcdefX"), "0123456789abcdef", nil},
		{"empty", nil, "", errNoExt4},
		{"too small", superblock(StateLabel)[:superblockOffset+superblockSize-1], "", errNoExt4},
		{"zeros", make([]byte, 8192), "", errNoExt4},
	} {
		got, err := readExt4(bytes.NewReader(tt.dev))
		if got.label != tt.label || !errors.Is(err, tt.err) {
			t.Errorf("%s: readExt4 = %q, %v; want %q, %v", tt.name, got.label, err, tt.label, tt.err)
		}
	}
	broken := errors.New("medium error")
	if _, err := readExt4(readerAt(func([]byte, int64) (int, error) { return 0, broken })); !errors.Is(err, broken) {
		t.Errorf("readExt4 of a broken device = %v; want its error", err)
	}
}

type readerAt func([]byte, int64) (int, error)

func (f readerAt) ReadAt(p []byte, off int64) (int, error) { return f(p, off) }

// TestReadExt4Made checks our offsets against a file system that someone else made.
func TestReadExt4Made(t *testing.T) {
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		if mkfs, err = exec.LookPath("/sbin/mkfs.ext4"); err != nil {
			t.Skip("mkfs.ext4 (package e2fsprogs) is not installed")
		}
	}
	disk := filepath.Join(t.TempDir(), "disk")
	if out, err := exec.Command(mkfs, "-q", "-L", StateLabel, disk, "2M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got, err := probeDevice(disk)
	if err != nil || got.label != StateLabel {
		t.Errorf("probeDevice = %q, %v; want %q", got.label, err, StateLabel)
	}
}

func FuzzExt4(f *testing.F) {
	f.Add(superblock(StateLabel)[superblockOffset:])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		sb, err := parseExt4(b)
		if err != nil && sb != (ext4Super{}) {
			t.Fatal("value and error")
		}
		if len(sb.label) > 16 || strings.Contains(sb.label, "\x00") {
			t.Fatalf("label %q", sb.label)
		}
	})
}

func TestFindState(t *testing.T) {
	setup := func(devices map[string][]byte) (sys, dev string) {
		sys, dev = t.TempDir(), t.TempDir()
		for name, content := range devices {
			if err := os.Mkdir(filepath.Join(sys, name), 0o755); err != nil {
				t.Fatal(err)
			}
			if content != nil {
				if err := os.WriteFile(filepath.Join(dev, name), content, 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
		return sys, dev
	}
	ours, other := superblock(StateLabel), superblock("other")
	for _, tt := range []struct {
		name    string
		devices map[string][]byte
		want    string
		err     string
	}{
		{"none", nil, "", ""},
		{"one", map[string][]byte{"vda": other, "vdb1": ours, "vdb": make([]byte, 4096)}, "vdb1", ""},
		{"other", map[string][]byte{"vda": other}, "", ""},
		{"two", map[string][]byte{"vda": ours, "vdb": ours}, "", "2 file systems"},
		{"memory", map[string][]byte{"ram0": ours, "loop0": ours, "zram0": ours}, "", ""},
		{"gone", map[string][]byte{"vda": nil, "vdb": ours}, "vdb", ""},
	} {
		sys, dev := setup(tt.devices)
		got, err := findState(sys, dev, StateLabel)
		if tt.want != "" {
			tt.want = filepath.Join(dev, tt.want)
		}
		if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s: findState = %q, %v; want %q, %q", tt.name, got, err, tt.want, tt.err)
		}
	}
	if got, err := findState(filepath.Join(t.TempDir(), "none"), "", StateLabel); got != "" || err != nil {
		t.Errorf("findState without block devices = %q, %v; want none", got, err)
	}
}

func TestParseStat(t *testing.T) {
	for _, tt := range []struct {
		line  string
		state string
		ppid  int
	}{
		{"12 (sh) Z 1 12 12 0 -1", "Z", 1},
		{"12 (a ) Z 7) (b) S 3 12", "S", 3},
		{"12 (sh", "", 0},
		{"12 (sh) Z", "", 0},
		{"12 (sh) Z x", "", 0},
		{"", "", 0},
	} {
		if state, ppid := parseStat(tt.line); state != tt.state || ppid != tt.ppid {
			t.Errorf("parseStat(%q) = %q, %d; want %q, %d", tt.line, state, ppid, tt.state, tt.ppid)
		}
	}
}

func TestZombies(t *testing.T) {
	cmd := exec.Command("/bin/true")
	if err := cmd.Start(); err != nil {
		t.Skipf("start a process: %v", err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if slices.Contains(zombies("/proc", os.Getpid()), cmd.Process.Pid) {
			break
		}
		if time.Now().After(deadline) {
			t.Error("a dead child was not found")
			break
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if slices.Contains(zombies("/proc", os.Getpid()), cmd.Process.Pid) {
		t.Error("a child that was waited for is still listed")
	}
}

func link(name, mac string) netlink.Link {
	hw, err := net.ParseMAC(mac)
	if err != nil {
		panic(err)
	}
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: hw}}
}

func TestPlanNetwork(t *testing.T) {
	links := []netlink.Link{link("eth0", "52:54:00:00:00:01"), link("eth1", "52:54:00:00:00:aa")}
	names := func(plans []ifPlan) (all []string) {
		for _, p := range plans {
			s := p.link.Attrs().Name
			if p.cfg.DHCP {
				s += " dhcp"
			}
			all = append(all, s)
		}
		return all
	}
	for _, tt := range []struct {
		name string
		cfg  []Interface
		want []string
		errs int
	}{
		{"no configuration", nil, []string{"eth0 dhcp", "eth1 dhcp"}, 0},
		{"by name", []Interface{{Match: "eth1"}}, []string{"eth1"}, 0},
		{"by address", []Interface{{Match: "52:54:00:00:00:AA", DHCP: true}}, []string{"eth1 dhcp"}, 0},
		{"not there", []Interface{{Match: "eth7"}, {Match: "eth0"}}, []string{"eth0"}, 1},
	} {
		plans, errs := planNetwork(tt.cfg, links)
		if diff := cmp.Diff(tt.want, names(plans)); diff != "" || len(errs) != tt.errs {
			t.Errorf("%s: planNetwork: %d errors, want %d; (-want +got):\n%s", tt.name, len(errs), tt.errs, diff)
		}
	}
}

func TestResolver(t *testing.T) {
	r := &resolver{file: filepath.Join(t.TempDir(), "resolv.conf"), static: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}
	if err := r.write([]netip.Addr{netip.MustParseAddr("10.0.2.3")}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(r.file)
	if want := "nameserver 192.0.2.1\nnameserver 10.0.2.3\n"; err != nil || string(b) != want {
		t.Errorf("resolv.conf = %q, %v; want %q", b, err, want)
	}
}

func TestClock(t *testing.T) {
	file := filepath.Join(t.TempDir(), "clock")
	touch(file)
	if o, detail, err := setClock(file); o != Done || err != nil || detail != "" {
		t.Errorf("setClock with a file from now = %s, %q, %v; want %s and nothing moved", o, detail, err, Done)
	}
	touch(file)
	if st, err := os.Stat(file); err != nil || time.Since(st.ModTime()) > time.Minute {
		t.Errorf("touch: %v, %v", st.ModTime(), err)
	}
}

func TestBuildDate(t *testing.T) {
	for _, tt := range []struct{ version, want string }{
		{"#1 SMP Debian 6.1.176-1 (2026-07-09)", "2026-07-09"},
		{"#1 SMP PREEMPT_DYNAMIC Debian 6.12.117-1~deb12u1 (2026-11-01)", "2026-11-01"},
		{"#1 SMP Thu Jan  1 00:00:00 UTC 2026", "0001-01-01"},
		{"(2026-99-99)", "0001-01-01"},
		{"", "0001-01-01"},
	} {
		if got := buildDate(tt.version).Format(time.DateOnly); got != tt.want {
			t.Errorf("buildDate(%q) = %s; want %s", tt.version, got, tt.want)
		}
	}
}

// TestFeedWatchdog has a file in the watchdog's place: each feeding adds a byte.
func TestFeedWatchdog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, err := os.Create(filepath.Join(t.TempDir(), "watchdog"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		fed := func() int64 {
			n, err := f.Seek(0, io.SeekEnd)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		m := &Machine{log: slog.New(slog.DiscardHandler)}
		ctx, cancel := context.WithCancel(t.Context())
		go m.feedWatchdog(ctx, early.NewWatchdog(f, 60*time.Second))
		time.Sleep(59 * time.Second)
		synctest.Wait()
		if got := fed(); got != 4 { // at once, and after 15, 30, 45 s
			t.Errorf("fed %d times in 59 s; want 4", got)
		}
		m.FeedWhile(func() error { return errors.New("the engine stands still") })
		before := fed()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if got := fed(); got != before {
			t.Errorf("fed %d times while not alive", got-before)
		}
		m.FeedWhile(nil)
		time.Sleep(20 * time.Second)
		synctest.Wait()
		if fed() == before {
			t.Error("not fed when alive again")
		}
		cancel()
		synctest.Wait()
	})
}
