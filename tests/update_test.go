package tests

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/firmware"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/tests/lab"
)

// TestUpdateDPU updates a DPU from afar: its agent takes a bundle over Redfish into the slot that does not run, the loader starts it, the agent in it
// says that it is good. Before that it refuses what is not for it, and an upload that breaks off goes on.
func TestUpdateDPU(t *testing.T) {
	needLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
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
