package firmware

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/bundle"
	"github.com/backdoor-rhs/backdoor/boot/slot"
	"github.com/backdoor-rhs/backdoor/images/bundler"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/service"
)

var (
	flashSize = flag.Int("flash-size", 96, "MiB of the image that TestFlashMemory flashes")
	child     = flag.String("serve-disk", "", "used by TestFlashMemory itself")
)

// most is what the process that flashes may take of memory, in bytes, whatever the image's size.
const most = 64 << 20

// TestFlashMemory flashes a large image into a process of its own, and asks the kernel how much memory that ever had (VmHWM). With
// -flash-size=1024 behind the package it is a GiB.
func TestFlashMemory(t *testing.T) {
	if *child != "" {
		serveDisk(t, *child)
		return
	}
	if testing.Short() {
		t.Skip("some hundred MiB are left out of short runs")
	}
	dir := t.TempDir()
	m := &machine{t: t, dir: dir, large: 1 << 20}
	var err error
	if m.key, m.roots, err = bundler.Development(filepath.Join(dir, "keys")); err != nil {
		t.Fatal(err)
	}
	if m.root, err = bundle.ReadRoots(m.roots); err != nil {
		t.Fatal(err)
	}
	large := int64(*flashSize) << 20
	if _, err := bundler.Burn(filepath.Join(dir, "disk.img"), m.bundle("1.0", nil), slot.Layout{Slot: large + 8<<20, NoGolden: true}, bundle.Policy{Root: m.root}, time.Now()); err != nil {
		t.Fatal(err)
	}
	sparse := filepath.Join(dir, "large")
	if err := os.WriteFile(sparse, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(sparse, large); err != nil {
		t.Fatal(err)
	}
	image := m.bundle("1.1", func(o *bundler.Options) { o.Initramfs = sparse })
	cmd := exec.Command(os.Args[0], "-test.run=^TestFlashMemory$", "-serve-disk="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill() // it serves until then
		_ = cmd.Wait()
	}()
	lines := bufio.NewScanner(out)
	for m.url == "" && lines.Scan() {
		m.url, _ = strings.CutPrefix(lines.Text(), "serves ")
		if !strings.HasPrefix(m.url, "https://") {
			m.url = ""
		}
	}
	if m.client, err = client.New(client.Config{URL: m.url, User: user, Password: password, Insecure: true, Basic: true}); err != nil {
		t.Fatal(err)
	}
	peak := func() int64 {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == "VmHWM:" {
				n, err := strconv.ParseInt(f[1], 10, 64)
				if err != nil {
					t.Fatal(err)
				}
				return n << 10
			}
		}
		t.Fatal("no VmHWM")
		return 0
	}
	before, began := peak(), time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	// Beside it, an operator looks at the service.
	looked := make(chan []time.Duration, 1)
	looking, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		var all []time.Duration
		defer func() { looked <- all }()
		c, err := client.New(client.Config{URL: m.url, User: user, Password: password, Insecure: true})
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close(ctx)
		for looking.Err() == nil {
			var o map[string]any
			began := time.Now()
			if err := c.Get(looking, "/redfish/v1/UpdateService", &o); err != nil {
				if looking.Err() == nil {
					t.Errorf("GET beside the upload: %v", err)
				}
				return
			}
			all = append(all, time.Since(began))
		}
	}()
	task, err := m.client.Push(ctx, image, size(t, image), client.PushOptions{}, nil)
	if err == nil {
		_, err = m.client.Wait(ctx, task.ODataID, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	took, after := time.Since(began), peak()
	stop()
	gets := <-looked
	slices.Sort(gets)
	if len(gets) == 0 {
		t.Fatal("nothing was answered beside the upload")
	}
	t.Logf("%d GETs beside it, median %v, p99 %v", len(gets), gets[len(gets)/2].Round(time.Microsecond), gets[len(gets)*99/100].Round(time.Microsecond))
	t.Logf("%d MiB in %v, %.0f MB/s; at most %.1f MiB of memory, %.1f before", size(t, image)>>20, took.Round(time.Millisecond), float64(size(t, image))/1e6/took.Seconds(), float64(after)/(1<<20), float64(before)/(1<<20))
	if after > most {
		t.Errorf("the process that flashed took %d bytes of memory; want at most %d", after, most)
	}
}

// serveDisk is the other process: an agent's UpdateService over the disk in dir.
func serveDisk(t *testing.T, dir string) {
	f, err := slot.OpenFile(filepath.Join(dir, "disk.img"), false)
	if err != nil {
		t.Fatal(err)
	}
	d, err := slot.OpenGPT(f)
	if err == nil {
		err = d.Try(slot.A)
	}
	if err == nil {
		err = d.Good(slot.A)
	}
	if err != nil {
		t.Fatal(err)
	}
	u, err := New(Options{Disk: d, Running: slot.A})
	if err != nil {
		t.Fatal(err)
	}
	o := service.Options{
		StateDir: t.TempDir(), Account: &service.Credential{User: user, Password: password}, Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
		Limits: service.Limits{Hash: service.HashCost{Memory: 64, Passes: 1}},
	}
	Configure(&o, u)
	s, err := service.New(o)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("serves https://" + l.Addr().String())
	t.Fatal(s.Serve(context.Background(), l))
}
