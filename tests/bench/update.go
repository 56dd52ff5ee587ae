package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/bundle"
	"github.com/backdoor-rhs/backdoor/boot/slot"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/tests/lab"
)

// update measures an update of the DPU from the first byte sent until the new image has found itself good, and how long the machine takes to come
// up with its other image when the one that is to be started is of no use.
func update(ctx context.Context, r *report, o options) error {
	if err := flash(r); err != nil {
		return err
	}
	l, err := lab.Up(ctx, lab.Config{HostKernel: o.kernel, Slots: true, Log: r.log})
	if err != nil {
		return err
	}
	defer l.Close()
	d := l.DPU
	good := func(mark int) error {
		_, err := d.Console().Wait(ctx, mark, goodLine)
		return err
	}
	if err := good(0); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bench-update-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var size int64
	var installed, started, whole []time.Duration
	for i := range o.n {
		path := filepath.Join(dir, "bundle")
		if err := d.Slots.Make(path, lab.Release{Version: fmt.Sprintf("1.%d.0", i+1)}); err != nil {
			return err
		}
		mark := d.Console().Mark()
		var task, all time.Duration
		if size, task, all, err = push(ctx, d, path, func() error { return good(mark) }); err != nil {
			return err
		}
		installed, started, whole = append(installed, task), append(started, all-task), append(whole, all)
	}
	what := fmt.Sprintf("harness: a bundle of %.1f MB by Redfish; the host idles", float64(size)/1e6)
	r.add("DPU: update, sent and installed", "ms", what, ms(installed...)...)
	r.add("DPU: update, restarted and good", "ms", what, ms(started...)...)
	r.add("DPU: update end to end", "ms", what, ms(whole...)...)
	r.add("DPU: update end to end, 20 MB of it", "ms", what+"; the first part in proportion, the second whole",
		float64(installed[len(installed)-1].Milliseconds())*20e6/float64(size)+float64(started[len(started)-1].Milliseconds()))

	running := slot.A
	if s, err := d.Slots.State(); err != nil {
		return err
	} else if s.Active == slot.A {
		running = slot.B
	}
	for _, f := range []struct {
		what    string
		release lab.Release
		spoil   func() error
	}{
		{"is damaged", lab.Release{Version: "9.1.0"}, func() error { return d.Slots.Tamper(running, 20<<20) }},
		{fmt.Sprintf("panics at each of %d starts", slot.TrialBoots), lab.Release{Version: "9.2.0", Arguments: "rdinit=/nothing init=/nothing"}, nil},
		{"hangs at its last start", lab.Release{Version: "9.3.0", Arguments: "rdinit=/bbin/cat"}, func() error {
			for range slot.TrialBoots - 1 {
				if err := d.Slots.Count(running); err != nil {
					return err
				}
			}
			return nil
		}},
	} {
		d.PowerOff()
		if err := d.Slots.Install(f.release); err != nil {
			return err
		}
		if f.spoil != nil {
			if err := f.spoil(); err != nil {
				return err
			}
		}
		if err := d.Restart(ctx); err != nil {
			return err
		}
		if err := good(d.StartMark()); err != nil {
			return err
		}
		r.add("DPU: fallback, the new image "+f.what, "ms", "harness: from power on to the first Redfish answer of the other image", ms(d.BootTook)...)
	}
	return nil
}

// push updates the DPU and returns how large the bundle is, how long it took until it was installed, and until awaited says that the new image is good.
func push(ctx context.Context, d *lab.DPU, path string, awaited func() error) (size int64, installed, whole time.Duration, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, 0, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return 0, 0, 0, err
	}
	c, err := d.Redfish()
	if err != nil {
		return 0, 0, 0, err
	}
	defer c.Close(context.WithoutCancel(ctx)) //nolint:errcheck // the machine starts anew
	began := time.Now()
	task, err := c.Push(ctx, f, st.Size(), client.PushOptions{Apply: "OnStartUpdateRequest"}, nil)
	if err == nil {
		_, err = c.Wait(ctx, task.ODataID, nil)
	}
	if err != nil {
		return 0, 0, 0, err
	}
	installed = time.Since(began)
	if _, err = c.Post(ctx, client.UpdateURI+"/Actions/UpdateService.StartUpdate", struct{}{}, nil); err != nil {
		return 0, 0, 0, err
	}
	err = awaited()
	return st.Size(), installed, time.Since(began), err
}

// flashed is the size of the image that flash installs.
const flashed = 1 << 30

// flash installs a bundle of 1 GiB as the agent does, into a slot of a file, and tells what this process held in memory at most.
func flash(r *report) error {
	dir, err := os.MkdirTemp("", "bench-flash-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	now := time.Now().UTC().Truncate(time.Second)
	role := bundle.Role{Keys: []string{bundle.KeyID(public)}, Threshold: 1}
	root := bundle.Root{Format: 1, Version: 1, Expires: now.AddDate(1, 0, 0), Keys: []bundle.Key{{ID: role.Keys[0], Public: public}}, Root: role, Release: role}
	policy := bundle.Policy{Root: root, Product: "backdoor", Machine: "bench", Now: now}
	build := func(w io.Writer, version string, size int64) error {
		parts := []bundle.Content{
			{Name: bundle.PartKernel, From: zeros{}, Size: size}, {Name: bundle.PartInitramfs, From: bytes.NewReader([]byte("initramfs")), Size: 9},
		}
		rootEnvelope, err := bundle.NewRoot(root)
		if err != nil {
			return err
		}
		e, err := bundle.Describe(bundle.Manifest{
			Format: 1, Product: "backdoor", Machine: "bench", Version: version, Epoch: 1, Released: now, Expires: now.AddDate(1, 0, 0),
		}, parts)
		if err := errors.Join(err, rootEnvelope.Sign(crypto.Signer(key)), e.Sign(crypto.Signer(key))); err != nil {
			return err
		}
		return bundle.Write(w, []bundle.Envelope{rootEnvelope}, e, parts)
	}
	layout := slot.Layout{Slot: flashed + 8<<20}
	path := filepath.Join(dir, "disk")
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := errors.Join(file.Truncate(layout.Size()), file.Close()); err != nil {
		return err
	}
	dev, err := slot.OpenFile(path, false)
	if err != nil {
		return err
	}
	defer dev.Close()
	disk, err := slot.Format(dev, layout)
	if err != nil {
		return err
	}
	var first bytes.Buffer
	if err := build(&first, "1.0.0", 1<<20); err != nil {
		return err
	}
	if err := errors.Join(disk.Provision(&first, policy, now), disk.Try(slot.A), disk.Good(slot.A)); err != nil {
		return err
	}
	before, err := peak()
	if err != nil {
		return err
	}
	began := time.Now()
	in, out := io.Pipe()
	go func() { out.CloseWithError(build(out, "2.0.0", flashed)) }()
	defer in.Close()
	b, err := bundle.NewReader(in, policy)
	if err != nil {
		return err
	}
	u, err := disk.Begin(slot.A, &b.Head, 0)
	if err != nil {
		return err
	}
	if _, err := io.Copy(u, b); err != nil {
		return err
	}
	if err := u.Commit(policy, false, now); err != nil {
		return err
	}
	took := time.Since(began)
	after, err := peak()
	if err != nil {
		return err
	}
	const how = "this machine's kernel, VmHWM of this process"
	r.add("resident memory at most, before", "MiB", how, before)
	r.add("resident memory at most, after 1 GiB was verified and flashed", "MiB", how+"; the maker of the image is in it", after)
	r.add("1 GiB verified, written to a file, and verified there", "MB/s", "harness, natively", flashed/1e6/took.Seconds())
	return nil
}

// peak is the most that this process has had resident, in MiB.
func peak() (float64, error) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	_, rest, ok := bytes.Cut(b, []byte("VmHWM:"))
	if !ok {
		return 0, errors.New("/proc/self/status has no VmHWM")
	}
	var kib float64
	if _, err := fmt.Sscan(string(rest), &kib); err != nil {
		return 0, fmt.Errorf("VmHWM: %w", err)
	}
	return kib / 1024, nil
}
