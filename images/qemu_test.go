package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/boot"
	"github.com/backdoor-rhs/backdoor/images/builder"
)

// A report is what boot/internal/testinit says.
type report struct {
	Uptime, UpTook float64
	InImage        bool
	Steps          []boot.Step
	Persistent     bool
	Boots          int
	Addresses      []string
	Modules        []string
	Mounts         string
	Error          string
}

func (r report) step(name string) boot.Step {
	for _, s := range r.Steps {
		if s.Name == name {
			return s
		}
	}
	return boot.Step{Name: name, Outcome: "missing"}
}

// buildTestImage builds an image with testinit in the agent's place.
func buildTestImage(t *testing.T, name string) (dir string, img builder.Image) {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a machine in QEMU; not with -short")
	}
	img, err := builder.Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	o := builder.Options{Module: "..", Out: dir, Agent: "./boot/internal/testinit", Logger: slog.New(slog.NewTextHandler(t.Output(), nil))}
	if _, err := builder.Build(t.Context(), img, o); err != nil {
		t.Fatal(err)
	}
	return dir, img
}

// makeDisk makes an ext4 disk from files.
func makeDisk(t *testing.T, label string, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	disk := filepath.Join(t.TempDir(), "disk.img")
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		mkfs = "/sbin/mkfs.ext4" // not in a plain user's PATH
	}
	if out, err := exec.Command(mkfs, "-q", "-L", label, "-d", dir, disk, "32M").CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	return disk
}

// start boots an image and returns testinit's report when QEMU has ended, and how long that took. QEMU must end by
// itself: with the guest's reboot or power-off, or the watchdog's bite.
func start(t *testing.T, dir string, img builder.Image, verb string, machine ...string) (report, time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	file := func(ext string) string { return filepath.Join(dir, img.Name+ext) }
	args := append(machine, "-nographic", "-nodefaults", "-serial", "stdio", "-monitor", "none", "-no-reboot",
		"-kernel", file(".vmlinuz"), "-initrd", file(".cpio.zst"),
		"-append", img.CommandLine()+` uroot.uinitargs="`+verb+`"`)
	if img.DTB != "" {
		args = append(args, "-dtb", file(".dtb"))
	}
	qemu := map[string]string{"arm64": "qemu-system-aarch64", "amd64": "qemu-system-x86_64", "arm": "qemu-system-arm"}[img.GOARCH]
	cmd := exec.CommandContext(ctx, qemu, args...)
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	console, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var r report
	var uinit time.Duration
	found := false
	var log bytes.Buffer
	sc := bufio.NewScanner(io.TeeReader(console, &log))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		line := strings.TrimRight(sc.Text(), "\r")
		if strings.Contains(line, "Welcome to u-root") {
			uinit = time.Since(begin)
		}
		if _, text, ok := strings.Cut(line, "TESTINIT "); ok {
			if err := json.Unmarshal([]byte(text), &r); err != nil {
				t.Errorf("report: %v: %s", err, text)
			}
			found = true
		}
		if strings.Contains(line, "System halted") { // a board without a power switch
			_ = cmd.Process.Kill()
		}
	}
	err = cmd.Wait()
	took := time.Since(begin)
	if !found {
		t.Fatalf("no report in %s: %v\n%s\n%s", took, err, complaint.String(), log.String())
	}
	t.Logf("%s: init after %.1f s (machine's start to here), agent's main at uptime %.2f s, boot.Up %.2f s, QEMU ended after %.1f s",
		img.Name, uinit.Seconds(), r.Uptime, r.UpTook, took.Seconds())
	for _, s := range r.Steps {
		t.Logf("  %-8s %-7s %6.0f ms  %s %s", s.Name, s.Outcome, s.Took.Seconds()*1e3, s.Detail, s.Err)
	}
	if !r.InImage {
		t.Error("boot.InImage() = false in an image")
	}
	if r.Error != "" {
		t.Error(r.Error)
	}
	return r, took
}

func wantStep(t *testing.T, r report, name string, outcome boot.Outcome, detail string) {
	t.Helper()
	if s := r.step(name); s.Outcome != outcome || !strings.Contains(s.Detail, detail) {
		t.Errorf("step %s = %s, %q, %s; want %s, …%s…", name, s.Outcome, s.Detail, s.Err, outcome, detail)
	}
}

const twoInterfaces = `{"hostname":"dpu0","interfaces":[
	{"match":"eth0","dhcp":true},
	{"match":"52:54:00:00:00:02","addresses":["192.168.77.2/24"],"mtu":9000}]}`

func TestDPUArm64(t *testing.T) {
	dir, img := buildTestImage(t, "dpu-arm64")
	disk := makeDisk(t, boot.StateLabel, map[string]string{"boot.json": twoInterfaces})
	machine := []string{"-M", "virt", "-cpu", "cortex-a57", "-m", "512", "-smp", "1,maxcpus=2"}
	network := []string{
		"-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,romfile=",
		"-netdev", "hubport,id=n1,hubid=1", "-device", "virtio-net-pci,netdev=n1,mac=52:54:00:00:00:02,host_mtu=9000,romfile=",
	}
	storage := []string{"-drive", "if=none,id=d0,format=raw,file=" + disk, "-device", "virtio-blk-pci,drive=d0,romfile="}
	for n := 1; n <= 2; n++ {
		r, _ := start(t, dir, img, "poweroff", slices.Concat(machine, network, storage)...)
		wantStep(t, r, "mounts", boot.Done, "")
		wantStep(t, r, "modules", boot.Done, "virtio_net")
		wantStep(t, r, "state", boot.Done, "/dev/vda")
		wantStep(t, r, "hostname", boot.Done, "dpu0")
		wantStep(t, r, "watchdog", boot.Absent, "")
		wantStep(t, r, "network", boot.Done, "eth0 10.0.2.15 by DHCP")
		if !slices.Contains(r.Addresses, "192.168.77.2/24") {
			t.Errorf("addresses = %v; want 192.168.77.2/24 among them", r.Addresses)
		}
		if !r.Persistent || r.Boots != n {
			t.Errorf("boot %d: persistent %v, boots counted on the disk %d", n, r.Persistent, r.Boots)
		}
	}
	// Without a disk and a network it comes up all the same, and says what is missing.
	r, _ := start(t, dir, img, "reboot", machine...)
	wantStep(t, r, "state", boot.Absent, "MEMORY ONLY")
	wantStep(t, r, "network", boot.Absent, "")
	if r.Persistent {
		t.Error("persistent without a disk")
	}
	// Two disks that both claim to be ours: neither is touched.
	second := makeDisk(t, boot.StateLabel, nil)
	two := slices.Concat(machine, storage, []string{"-drive", "if=none,id=d1,format=raw,file=" + second, "-device", "virtio-blk-pci,drive=d1,romfile="})
	r, _ = start(t, dir, img, "poweroff", two...)
	wantStep(t, r, "state", boot.Unclear, "MEMORY ONLY")
}

func TestDPUAmd64(t *testing.T) {
	dir, img := buildTestImage(t, "dpu-amd64")
	disk := makeDisk(t, boot.StateLabel, nil)
	machine := []string{
		"-M", "q35", "-cpu", "max", "-m", "512", "-smp", "1",
		"-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,romfile=",
		"-drive", "if=none,id=d0,format=raw,file=" + disk, "-device", "virtio-blk-pci,drive=d0,romfile=",
		"-device", "i6300esb", "-action", "watchdog=poweroff",
	}
	r, _ := start(t, dir, img, "poweroff", machine...)
	wantStep(t, r, "modules", boot.Done, "virtio_net")
	wantStep(t, r, "state", boot.Done, "/dev/vda")
	wantStep(t, r, "network", boot.Done, "10.0.2.15 by DHCP")
	wantStep(t, r, "watchdog", boot.Done, "/dev/watchdog")
}

// TestWatchdog has an agent that no longer does its work, and a watchdog that ends the machine for it.
func TestWatchdog(t *testing.T) {
	dir, img := buildTestImage(t, "dpu-amd64")
	disk := makeDisk(t, boot.StateLabel, map[string]string{"boot.json": `{"watchdogSeconds":6}`})
	r, took := start(t, dir, img, "hang", "-M", "q35", "-cpu", "max", "-m", "512", "-smp", "1",
		"-drive", "if=none,id=d0,format=raw,file="+disk, "-device", "virtio-blk-pci,drive=d0,romfile=",
		"-device", "i6300esb", "-action", "watchdog=poweroff")
	wantStep(t, r, "watchdog", boot.Done, "6s")
	t.Logf("bitten %.1f s after the start", took.Seconds())
}

func TestBMCArmv7(t *testing.T) {
	dir, img := buildTestImage(t, "bmc-armv7")
	r, _ := start(t, dir, img, "reboot", "-M", "ast2600-evb", "-m", "1G",
		"-net", "nic", "-net", "user")
	wantStep(t, r, "modules", boot.Done, "ftgmac100")
	wantStep(t, r, "state", boot.Absent, "MEMORY ONLY")
	wantStep(t, r, "clock", boot.Done, "the kernel's build") // the board has no clock of its own
	wantStep(t, r, "network", boot.Done, "10.0.2.15 by DHCP")
	wantStep(t, r, "watchdog", boot.Done, "/dev/watchdog0")
}
