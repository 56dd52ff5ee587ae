package main

import (
	"context"
	"crypto"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/boot/bundle"
	"github.com/backdoor-rhs/backdoor/boot/slot"
	"github.com/backdoor-rhs/backdoor/cmd/backdoord/config"
	"github.com/backdoor-rhs/backdoor/images/bundler"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/redfish/firmware"
)

// onTrial is a worker whose machine was started from slot B, which is on trial; slot A is good.
func onTrial(t *testing.T) *worker {
	t.Helper()
	dir := t.TempDir()
	key, roots, err := bundler.Development(dir)
	if err != nil {
		t.Fatal(err)
	}
	root, err := bundle.ReadRoots(roots)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"kernel", "initramfs"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	file := func(version string) *os.File {
		path := filepath.Join(dir, version)
		err := bundler.MakeFile(path, bundler.Options{
			Machine: "test", Version: version, Released: time.Now(), CommandLine: "quiet", Roots: roots, Signers: []crypto.Signer{key},
			Kernel: filepath.Join(dir, "kernel"), Initramfs: filepath.Join(dir, "initramfs"),
		})
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	p := bundle.Policy{Root: root}
	disk := filepath.Join(dir, "disk")
	if _, err := bundler.Burn(disk, file("1.0"), slot.Layout{Slot: 1 << 20}, p, time.Now()); err != nil {
		t.Fatal(err)
	}
	dev, err := slot.OpenFile(disk, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	d, err := slot.OpenGPT(dev)
	if err != nil {
		t.Fatal(err)
	}
	next := file("1.1")
	img, err := bundle.OpenAt(next, p)
	if err != nil {
		t.Fatal(err)
	}
	all := make([]byte, img.Size())
	if _, err := next.ReadAt(all, 0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.Try(slot.A), d.Good(slot.A)); err != nil {
		t.Fatal(err)
	}
	u, err := d.Begin(slot.A, &img.Head, 0)
	if err == nil {
		_, err = u.Write(all)
	}
	if err == nil {
		err = errors.Join(u.Commit(p, false, time.Now()), d.Try(slot.B))
	}
	if err != nil {
		t.Fatal(err)
	}
	w := newWorker(config.Default(), slog.New(slog.NewTextHandler(t.Output(), nil)))
	w.console = t.Output()
	w.cfg.StateDir = filepath.Join(dir, "state")
	if err := os.MkdirAll(w.cfg.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if w.journal, err = journal.OpenFile(filepath.Join(w.cfg.StateDir, "journal"), 1<<20); err != nil {
		t.Fatal(err)
	}
	w.engine = engine.New(engine.Options{Logger: w.log, Journal: w.journal, Memory: func(context.Context) (hostmem.Memory, error) { return nil, errNothingToWatch }})
	w.images = &images{disk: d, running: slot.B, within: 100 * time.Millisecond}
	if w.images.updater, err = firmware.New(firmware.Options{Disk: d, Running: slot.B}); err != nil {
		t.Fatal(err)
	}
	return w
}

// TestProveRefuses has the image on trial give way as long as one part of the agent does not work, and say which.
func TestProveRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		ill  func(*worker)
		want string
	}{
		"journal": {func(w *worker) { w.journal = nil }, "journal"},
		"window":  {func(w *worker) { w.cfg.Memory.Backend = config.BackendPCI }, "window"},
		"redfish": {func(*worker) {}, "Redfish"},
	} {
		w := onTrial(t)
		tc.ill(w)
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		w.prove(ctx)
		select {
		case <-w.resets:
		default:
			t.Errorf("%s: the image on trial does not give way", name)
		}
		if s := w.images.disk.State(); s.B.Status != slot.Trial || !strings.Contains(s.B.Reason, tc.want) || s.Active != slot.A {
			t.Errorf("%s: the disk says %+v", name, s)
		}
		cancel()
		if w.journal != nil {
			w.journal.Close()
		}
	}
}

// TestProve runs a whole agent: when its parts work, the image is good, and the recovery image follows where it has to.
func TestProve(t *testing.T) {
	w := onTrial(t)
	w.images.within = time.Minute
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.cfg.Redfish.Listen = l.Addr().String()
	l.Close()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); w.run(ctx) }()
	for range 600 {
		if w.images.disk.State().Active == slot.B {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	cancel()
	<-done
	if s := w.images.disk.State(); s.Active != slot.B || s.B.Status != slot.Good || s.B.Boots != 0 || s.Epoch != 1 {
		t.Errorf("the disk says %+v", s)
	}
}
