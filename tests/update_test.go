package tests

import (
	"context"
	"errors"
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/boot/slot"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/firmware"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/tests/lab"
)

var powerCuts = flag.Int("power-cuts", 1, "at how many random moments of an update TestUpdateDPU cuts the DPU's power")

// TestUpdateDPU updates a DPU from afar: its agent takes a bundle over Redfish into the slot that does not run, the loader starts it, the agent in it
// says that it is good. Before that it refuses what is not for it, loses its power in the middle, and an upload that breaks off goes on.
func TestUpdateDPU(t *testing.T) {
	needLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute+time.Duration(*powerCuts)*time.Minute)
	defer cancel()
	l, err := lab.Up(ctx, lab.Config{Slots: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	u := &update{t: t, ctx: ctx, lab: l, dir: t.TempDir()}
	defer func() {
		if t.Failed() {
			t.Logf("the DPU's console ends with\n%s", strings.Join(l.DPU.Console().Tail(40), "\n"))
		}
	}()
	if u.client, err = l.DPU.Redfish(); err != nil {
		t.Fatal(err)
	}
	u.await("1.0.0")
	for name, tc := range map[string]struct {
		release lab.Release
		damage  int64 // counted from the end
		want    string
	}{
		"wrong machine": {lab.Release{Version: "1.1.0", Machine: "bmc-armv7"}, 0, "bmc-armv7"},
		"damaged":       {lab.Release{Version: "1.1.0"}, 1 << 20, "hash"},
	} {
		if _, err := u.push(u.bundle(name, tc.release, tc.damage), 0); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v; want it refused with %q", name, err, tc.want)
		}
	}
	f := u.bundle("good", lab.Release{Version: "1.1.0"}, 0)
	for i := range *powerCuts {
		u.cutPower(i, f)
	}
	broken, die := context.WithCancel(ctx)
	if _, err := u.client.Push(broken, &dying{f, 20 << 20, die}, u.size(f), client.PushOptions{}, nil); err == nil {
		t.Fatal("an upload that broke off ends well")
	}
	offset := u.partial()
	if offset < 8<<20 {
		t.Errorf("of 20 MiB that were sent %d bytes are there", offset)
	}
	began := time.Now()
	task, err := u.push(f, offset)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d of %d bytes sent and installed in %v: %d messages", u.size(f)-offset, u.size(f), time.Since(began).Round(time.Second), len(task.Messages))
	began = time.Now()
	u.await("1.1.0")
	t.Logf("restarted, and good, in %v", time.Since(began).Round(time.Second))
	if s, err := l.DPU.Slots.State(); err != nil || s.Active != "b" || s.B.Version != "1.1.0" || s.A.Version != "1.0.0" {
		t.Errorf("the disk says %+v, %v", s, err)
	}
}

// cutPower cuts the DPU's power at a random moment of an update, up to the one at which the task has ended, and has the machine start again: from a
// whole image, which says that it is good.
func (u *update) cutPower(i int, f *os.File) {
	u.t.Helper()
	const longest = 8 * time.Second // of an upload to an emulated DPU on a quiet machine
	moment := time.Duration(rand.Int64N(int64(longest)))
	began, ended := time.Now(), make(chan error, 1)
	ctx, cancel := context.WithCancel(u.ctx)
	defer cancel()
	go func() {
		task, err := u.client.Push(ctx, f, u.size(f), client.PushOptions{Apply: "OnStartUpdateRequest"}, nil)
		if err == nil {
			_, err = u.client.Wait(ctx, task.ODataID, nil)
		}
		ended <- err
	}()
	outcome := "in the middle"
	select {
	case err := <-ended:
		if err != nil {
			u.t.Errorf("cut %d: the update ended before the cut: %v", i, err)
		}
		outcome = "after the end"
	case <-time.After(moment): // the power fails when it does
	}
	u.lab.DPU.PowerOff()
	cancel()
	before, err := u.lab.DPU.Slots.State()
	if err != nil {
		u.t.Fatalf("cut %d: the disk: %v", i, err)
	}
	if before.A.Status != slot.Good {
		u.t.Errorf("cut %d: the disk says %+v", i, before)
	}
	if err := u.lab.DPU.Restart(u.ctx); err != nil {
		u.t.Fatalf("cut %d, after %v: the DPU does not start: %v; the disk says %+v", i, time.Since(began), err, before)
	}
	if u.client, err = u.lab.DPU.Redfish(); err != nil {
		u.t.Fatal(err)
	}
	u.await("1.0.0")
	u.t.Logf("cut %d, %v into the update, %s: slot B was %q with %d bytes, and 1.0.0 is good again", i, moment.Round(time.Millisecond), outcome, before.B.Status, before.B.Written)
}

type update struct {
	t      *testing.T
	ctx    context.Context
	lab    *lab.Lab
	client *client.Client
	dir    string
}

func (u *update) bundle(name string, r lab.Release, damage int64) *os.File {
	u.t.Helper()
	path := filepath.Join(u.dir, strings.ReplaceAll(name, " ", "-"))
	if err := u.lab.DPU.Slots.Make(path, r); err != nil {
		u.t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		u.t.Fatal(err)
	}
	u.t.Cleanup(func() { f.Close() })
	if damage > 0 {
		if _, err := f.WriteAt([]byte("damaged on the way"), u.size(f)-damage); err != nil {
			u.t.Fatal(err)
		}
	}
	return f
}

func (u *update) size(f *os.File) int64 {
	u.t.Helper()
	st, err := f.Stat()
	if err != nil {
		u.t.Fatal(err)
	}
	return st.Size()
}

func (u *update) push(f *os.File, offset int64) (*schema.Task, error) {
	u.t.Helper()
	task, err := u.client.Push(u.ctx, f, u.size(f), client.PushOptions{Apply: "Immediate", Offset: offset}, nil)
	if err != nil {
		return nil, err
	}
	return u.client.Wait(u.ctx, task.ODataID, nil)
}

// partial waits until the agent has noticed that the upload broke off, and returns how much is there.
func (u *update) partial() int64 {
	u.t.Helper()
	for u.ctx.Err() == nil {
		var s schema.UpdateService
		var o firmware.UpdateOEM
		if err := u.client.Get(u.ctx, client.UpdateURI, &s); err != nil {
			u.t.Fatal(err)
		}
		if _, err := client.OEM(s.OEM, &o); err != nil {
			u.t.Fatal(err)
		}
		item := u.item("slot-b")
		if o.Received > 0 && item != nil && item.Status.State == schema.StateDisabled {
			return o.Received
		}
		time.Sleep(200 * time.Millisecond)
	}
	u.t.Fatal("the agent does not notice that the upload broke off")
	return 0
}

func (u *update) item(id string) *schema.SoftwareInventory {
	var v schema.SoftwareInventory
	if err := u.client.Get(u.ctx, client.UpdateURI+"/FirmwareInventory/"+id, &v); err != nil {
		return nil
	}
	return &v
}

// await waits until a version runs and says that it is good.
func (u *update) await(version string) {
	u.t.Helper()
	for u.ctx.Err() == nil {
		for _, id := range []string{"slot-a", "slot-b"} {
			if v := u.item(id); v != nil && *v.Active && v.Version == version && v.Status.Health == schema.HealthOK {
				return
			}
		}
		select {
		case <-u.ctx.Done():
		case <-time.After(500 * time.Millisecond):
		}
	}
	u.t.Fatalf("version %s does not say that it is good", version)
}

// dying is an image whose sender dies on the way.
type dying struct {
	*os.File
	at  int64
	die func()
}

func (d *dying) ReadAt(p []byte, off int64) (int, error) {
	if off >= d.at {
		d.die()
		return 0, errors.New("the sender died")
	}
	return d.File.ReadAt(p, off)
}
