package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/bundle"
	"github.com/backdoor-rhs/backdoor/boot/handover"
	"github.com/backdoor-rhs/backdoor/boot/slot"
	"github.com/backdoor-rhs/backdoor/images/builder"
	"github.com/backdoor-rhs/backdoor/images/bundler"
	"github.com/backdoor-rhs/backdoor/images/initramfs"
)

// TestBMCArmv7Slots starts the BMC from slots on its eMMC, by the loader and 32-bit Arm's kexec, until its agent has kept the image.
func TestBMCArmv7Slots(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a machine in QEMU; not with -short")
	}
	dir := t.TempDir()
	var loaderImage builder.Image
	for _, name := range []string{"bmc-armv7", "loader-armv7"} {
		img, err := builder.Lookup(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := builder.Build(t.Context(), img, builder.Options{Module: "..", Out: dir}); err != nil {
			t.Fatal(err)
		}
		loaderImage = img
	}
	key, roots, err := bundler.Development(dir)
	if err != nil {
		t.Fatal(err)
	}
	root, err := bundle.ReadRoots(roots)
	if err != nil {
		t.Fatal(err)
	}
	policy := bundle.Policy{Root: root}
	file := filepath.Join(dir, "bmc.bundle")
	err = bundler.MakeFile(file, bundler.Options{
		Machine: "bmc-armv7", Version: "1.0.0", MinLoader: 1, Released: time.Now(), Dir: dir, Roots: roots, Signers: []crypto.Signer{key},
	})
	if err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	card := filepath.Join(dir, "card.img")
	if err := errors.Join(os.WriteFile(card, nil, 0o600), os.Truncate(card, 256<<20)); err != nil { // QEMU wants a power of two
		t.Fatal(err)
	}
	if _, err := bundler.Burn(card, in, slot.Layout{Slot: 48 << 20}, policy, time.Now()); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(roots)
	if err != nil {
		t.Fatal(err)
	}
	var a initramfs.Archive
	a.File(handover.Dir+"/"+handover.RootFile, text, 0o644)
	extra, err := a.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	loader := filepath.Join(dir, "loader-armv7")
	first, err := os.ReadFile(loader + ".cpio.zst")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(loader+".cpio", slices.Concat(first, make([]byte, -len(first)&3), extra), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-arm", "-M", "ast2600-evb", "-m", "1G", "-nographic", "-nodefaults", "-serial", "stdio", "-monitor", "none",
		"-no-reboot", "-net", "nic", "-net", "user", "-drive", "if=sd,index=2,format=raw,file="+card,
		"-kernel", loader+".vmlinuz", "-dtb", loader+".dtb", "-initrd", loader+".cpio", "-append", loaderImage.CommandLine())
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	console, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	sc := bufio.NewScanner(console)
	for sc.Scan() {
		line := strings.TrimRight(sc.Text(), "\r")
		t.Logf("%5.1f %s", time.Since(began).Seconds(), line)
		if strings.Contains(line, `msg="the image is good" slot=a version=1.0.0`) {
			return
		}
	}
	t.Fatalf("the agent in slot a does not say that it is good: %s", complaint.String())
}
