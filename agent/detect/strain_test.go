package detect

import (
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// strains judges a host of which a sample is taken every two seconds.
func strains(t *testing.T, d Detector, samples int, sample func(i int, j *JamSample)) []Finding {
	t.Helper()
	p := Pass{Now: time.Unix(1_800_000_000, 0), Beats: []kernel.Heartbeat{{Mono: int64(time.Hour)}}}
	for i := range samples {
		p.Now = p.Now.Add(jamsEvery)
		j := JamSample{At: p.Now}
		sample(i, &j)
		p.Jams = append(p.Jams, j)
	}
	return detect(t, d, &p)
}

func TestFilling(t *testing.T) {
	const mib = 1 << 20
	store := func(used uint64) []kernel.Store {
		return []kernel.Store{{Key: "tmpfs 0:30", What: "tmpfs 0:30", Used: used, Limit: 100 * mib, Bytes: true}}
	}
	for _, tt := range []struct {
		name   string
		n      int
		stores func(i int) []kernel.Store
		title  string
	}{
		{"full", 2, func(int) []kernel.Store { return store(96 * mib) }, "tmpfs 0:30 is full"},
		{"full for one sample", 3, func(i int) []kernel.Store { return store(uint64(10+86*(i/2)) * mib) }, ""},
		{"half full", 30, func(int) []kernel.Store { return store(50 * mib) }, ""},
		{"fills steadily", 30, func(i int) []kernel.Store { return store(uint64(50+i) * mib) }, "tmpfs 0:30 fills"},
		{"fills, and is emptied", 30, func(i int) []kernel.Store { return store(uint64(50+i%10) * mib) }, ""},
		{"fills slowly", 30, func(i int) []kernel.Store { return store(50*mib + uint64(i)*4096) }, ""},
		{"a big file was put there", 30, func(i int) []kernel.Store { return store(uint64(10+70*(i/20)) * mib) }, ""},
		{"other than before", 3, func(i int) []kernel.Store {
			s := store(99 * mib)
			s[0].Key += strings.Repeat("0", i)
			return s
		}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fs := strains(t, filling(DefaultConfig()), tt.n, func(i int, j *JamSample) { j.Stores = tt.stores(i) })
			if len(fs) == 0 && tt.title == "" {
				return
			}
			if len(fs) != 1 || fs[0].Title != tt.title {
				t.Errorf("%+v; want %q", fs, tt.title)
			}
		})
	}
}

func TestLinkFlaps(t *testing.T) {
	for _, tt := range []struct {
		name  string
		downs func(i int) uint32
		want  int
	}{
		{"steady", func(int) uint32 { return 7 }, 0},
		{"lost once", func(i int) uint32 { return uint32(i / 10) }, 0},
		{"again and again", func(i int) uint32 { return uint32(i / 3) }, 1},
		{"the counter wraps", func(i int) uint32 { return ^uint32(0) - 1 + uint32(i) }, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fs := strains(t, linkFlaps(DefaultConfig()), 12, func(i int, j *JamSample) {
				j.Links = []kernel.Link{{Name: "eth0", Index: 2, Downs: tt.downs(i)}, {Name: "eth1", Index: 3}}
			})
			if len(fs) != tt.want || tt.want == 1 && !strings.Contains(fs[0].Title, "eth0") {
				t.Errorf("%+v; want %d", fs, tt.want)
			}
		})
	}
}

// A host that starts loses its links by that, and tells of those that it loses later.
func TestLinkFlapsAtTheStart(t *testing.T) {
	for _, tt := range []struct {
		up   time.Duration
		want int
	}{{time.Minute, 0}, {70 * time.Second, 1}, {time.Hour, 1}} {
		p := Pass{Beats: []kernel.Heartbeat{{Mono: int64(tt.up)}}}
		for i := range 12 { // of 24 s
			p.Jams = append(p.Jams, JamSample{At: time.Unix(1_800_000_000, 0).Add(time.Duration(i) * jamsEvery), Links: []kernel.Link{{Name: "eth0", Index: 2, Downs: uint32(i)}}})
		}
		if fs := detect(t, linkFlaps(DefaultConfig()), &p); len(fs) != tt.want {
			t.Errorf("up for %v: %+v; want %d", tt.up, fs, tt.want)
		}
	}
}

// The lines are the kernel's, of the files that sayings names.
func TestLogged(t *testing.T) {
	for _, tt := range []struct {
		text, what, object string
		facility           uint8
		times              int
		title              string
	}{
		{text: "I/O error, dev sda, sector 2048 op 0x0:(READ) flags 0x0 phys_seg 1 prio class 2", what: "disk-error", object: "sda", times: 1, title: "disk sda reports errors"},
		{text: "critical medium error, dev nvme0n1, sector 90 op 0x1:(WRITE) flags 0x800 phys_seg 1 prio class 0", what: "disk-error", object: "nvme0n1", times: 1, title: "disk nvme0n1 reports errors"},
		{text: "blk_update_request: I/O error, dev vdb, sector 0 op 0x0:(READ)", what: "disk-error", object: "vdb", times: 1, title: "disk vdb reports errors"},
		{text: "EXT4-fs error (device sda1): ext4_lookup:1850: inode #2: comm ls: iget: bad extra_isize", what: "file-system", object: "sda1", times: 1, title: "the file system on sda1 is broken"},
		{text: "EXT4-fs (sda1): mounted filesystem with ordered data mode", what: ""},
		{text: "XFS (dm-0): Metadata corruption detected at xfs_agi_verify", what: "xfs", object: "dm-0", times: 1, title: "the file system on dm-0 is broken"},
		{text: "XFS (dm-0): Ending clean mount", what: ""},
		{text: "nvme nvme0: I/O 12 QID 4 timeout, aborting", what: "disk-timeout", object: "nvme0", times: 1, title: "disk nvme0 does not answer in time"},
		{text: "ata2.00: failed command: READ DMA", what: "disk-failed", object: "ata2.00", times: 1, title: "ata2.00 has failed commands"},
		{text: "pcieport 0000:00:1c.0: AER: PCIe Bus Error: severity=Uncorrectable (Non-Fatal), type=Transaction Layer, (Requester ID)", what: "pci-error", object: "0000:00:1c.0", times: 1, title: "PCI device 0000:00:1c.0 has met an error that cannot be corrected"},
		{text: "e1000e 0000:01:00.0: PCIe Bus Error: severity=Corrected, type=Physical Layer, (Receiver ID)", what: "pci-corrected", object: "0000:01:00.0", times: 2},
		{text: "e1000e 0000:01:00.0: PCIe Bus Error: severity=Correctable, type=Physical Layer, (Receiver ID)", what: "pci-corrected", object: "0000:01:00.0", times: 10, title: "the link of PCI device 0000:01:00.0 is bad"},
		{text: "mce: CPU3: Package temperature is above threshold, cpu clock is throttled (total events = 1)", what: "thermal", object: "CPU3", times: 1, title: "CPU3 is too hot and is throttled"},
		{text: "mce: CPU3: Core temperature/speed normal", what: ""},
		{text: "Memory failure: 0x12345: recovery action for dirty LRU page: Recovered", what: "memory-failure", object: "0x12345", times: 1, title: "the page 0x12345 has lost its memory"},
		{text: "TCP: request_sock_TCP: Possible SYN flooding on port 0.0.0.0:80. Sending cookies.", what: "syn-flood", object: "0.0.0.0:80", times: 1, title: "somebody floods port 0.0.0.0:80 with connections"},
		{text: "nf_conntrack: nf_conntrack: table full, dropping packet", what: "conntrack", times: 1, title: "no more connections can be tracked"},
		{text: "I/O error, dev sda, sector 2048", facility: 1, what: ""},                                 // by a program, through /dev/kmsg
		{text: "I/O error, dev fd0, sector 0 op 0x0:(READ) flags 0x0 phys_seg 1 prio class 2", what: ""}, // as each boot says where no disk is in it
		{text: "critical medium error, dev sr0, sector 64 op 0x0:(READ) flags 0x80700 phys_seg 1 prio class 2", what: ""},
		{text: "I/O error, dev sra, sector 2048 op 0x0:(READ)", what: "disk-error", object: "sra", times: 1, title: "disk sra reports errors"},
		{text: "audit: I/O error, dev sda, sector 1", what: ""},
	} {
		s, ok := Notable(kernel.LogRecord{Text: tt.text, Facility: tt.facility})
		if ok != (tt.what != "") || s.What != tt.what || s.Object != tt.object {
			t.Errorf("%s: %+v, %v; want %q of %q", tt.text, s, ok, tt.what, tt.object)
			continue
		}
		if !ok {
			continue
		}
		fs := strains(t, logged(DefaultConfig()), 12, func(i int, j *JamSample) {
			if i < tt.times {
				j.Said = []Said{s}
			}
		})
		if tt.title == "" && len(fs) == 0 {
			continue
		}
		if len(fs) != 1 || fs[0].Title != tt.title {
			t.Errorf("%s: %+v; want %q", tt.text, fs, tt.title)
		}
	}
}

func TestStorm(t *testing.T) {
	for _, tt := range []struct {
		name  string
		share func(second int) time.Duration // of each second
		want  int
	}{
		{"all the time", func(int) time.Duration { return 950 * time.Millisecond }, 1},
		{"much of the time, as where much is asked of a network", func(int) time.Duration { return 800 * time.Millisecond }, 0},
		{"half the time", func(int) time.Duration { return 500 * time.Millisecond }, 0},
		{"a burst", func(s int) time.Duration { return time.Duration(s/9) * time.Second }, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var used time.Duration
			fs := strains(t, storm(DefaultConfig()), 12, func(i int, j *JamSample) {
				used += 2 * tt.share(i)
				all := time.Duration(2*i) * time.Second
				j.Times = []kernel.CPUTime{{CPU: 0, Softirq: time.Duration(i) * 100 * time.Millisecond, All: time.Duration(i) * 120 * time.Millisecond}, // idle
					{CPU: 1, IRQ: used / 2, Softirq: used / 2, All: all}}
			})
			if len(fs) != tt.want || tt.want == 1 && *fs[0].Culprit.CPU != 1 {
				t.Errorf("%+v; want %d", fs, tt.want)
			}
		})
	}
}

func TestStrangers(t *testing.T) {
	k := func(pid, ppid int, kthread bool) kernel.Task {
		return kernel.Task{PID: pid, TGID: pid, PPID: ppid, KThread: kthread, Comm: "x"}
	}
	usual := []kernel.Task{k(1, 0, false), k(2, 0, true), k(3, 2, true), k(400, 1, false)}
	for _, tt := range []struct {
		name string
		old  []kernel.Task
		now  []kernel.Task
		want int
	}{
		{"none", usual, usual, 0},
		{"one that a program has made", append(usual, k(500, 400, true)), append(usual, k(500, 400, true)), 1},
		{"one that becomes a program", append(usual, k(500, 3, true)), append(usual, k(500, 3, false)), 0},
		{"one that is new", usual, append(usual, k(500, 400, true)), 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fs := detect(t, strangers(DefaultConfig()), &Pass{Tasks: []TaskSample{{Tasks: tt.old}, {Tasks: tt.now}}})
			if len(fs) != tt.want || tt.want == 1 && fs[0].Culprit.PID != 500 {
				t.Errorf("%+v; want %d", fs, tt.want)
			}
		})
	}
}

func TestClockSetAndStands(t *testing.T) {
	at := func(hours int) int64 {
		return time.Unix(1_800_000_000, 0).Add(time.Duration(hours) * time.Hour).UnixNano()
	}
	for _, tt := range []struct {
		name string
		wall []int64
		up   time.Duration
		want string
	}{
		{"as it was", []int64{at(0), at(0) + 100, at(0) - 1e8}, time.Hour, ""},
		{"unknown for a while", []int64{at(0), 0, at(0)}, time.Hour, ""},
		{"back", []int64{at(0), at(-2), at(-2)}, time.Hour, "back"},
		{"ahead", []int64{at(0), at(2), at(2)}, time.Hour, "ahead"},
		{"soon after the boot", []int64{at(0), at(2), at(2)}, 20 * time.Second, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			now := time.Unix(1_800_000_000, 0)
			p := Pass{Now: now}
			for i, w := range tt.wall {
				p.Jams = append(p.Jams, JamSample{At: now.Add(time.Duration(i) * jamsEvery), BootWall: w})
			}
			for i := range 3 {
				p.Beats = append(p.Beats, kernel.Heartbeat{At: now.Add(time.Duration(i) * 50 * time.Millisecond), Mono: int64(tt.up) + int64(i)*5e7, CPUs: make([]kernel.CPU, 1)})
			}
			fs := detect(t, clock(DefaultConfig()), &p)
			if tt.want == "" && len(fs) == 0 {
				return
			}
			if len(fs) != 1 || !strings.Contains(fs[0].Title, tt.want) {
				t.Errorf("%+v; want %q", fs, tt.want)
			}
		})
	}
	// Ticks that go by the clock stand with it; the timer's interrupts do not.
	p := Pass{}
	for i := range 130 {
		p.Beats = append(p.Beats, kernel.Heartbeat{At: time.Unix(1_800_000_000, 0).Add(time.Duration(i) * 50 * time.Millisecond), Mono: int64(time.Hour), Jiffies: 5,
			CPUs: []kernel.CPU{{Online: true, TimerIRQs: uint64(10 * i)}}})
	}
	if fs := detect(t, clock(DefaultConfig()), &p); len(fs) != 1 || fs[0].Key != "stands" || fs[0].Suspicion {
		t.Errorf("a clock that stands: %+v", fs)
	}
}
