package lab

import (
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// TestMedia lends HOST a CD through its BMC and has it boot from that once, over a power cycle.
func TestMedia(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a virtual machine: left out with -short")
	}
	l, err := Up(t.Context(), Config{NoDPU: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}()
	b, err := client.New(client.Config{URL: l.BMC.URL, User: l.BMC.User, Password: l.BMC.Password, Insecure: true})
	if err != nil {
		t.Fatal(err)
	}
	iso := strings.Repeat("not really an ISO ", 1024)
	files := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "x.iso", time.Time{}, strings.NewReader(iso))
	}))
	defer files.Close()
	const drive = "/redfish/v1/Systems/system/VirtualMedia/Cd"
	inserted := func() string {
		t.Helper()
		var blocks []struct {
			Device   string
			Inserted *struct{ File string }
		}
		if err := l.Host.QMP(t.Context(), "query-block", nil, &blocks); err != nil {
			t.Fatal(err)
		}
		for _, b := range blocks {
			if b.Device == "cd0" && b.Inserted != nil {
				return filepath.Base(b.Inserted.File)
			}
		}
		return ""
	}
	if _, err := b.Post(t.Context(), drive+"/Actions/VirtualMedia.InsertMedia", map[string]any{"Image": files.URL + "/x.iso"}, nil); err != nil {
		t.Fatal(err)
	}
	if got := inserted(); got != "cd.iso" {
		t.Errorf("QEMU has %q in the drive", got)
	}
	if err := b.Patch(t.Context(), "/redfish/v1/Systems/system", map[string]any{"Boot": map[string]string{
		"BootSourceOverrideTarget": "Cd", "BootSourceOverrideEnabled": "Once", "BootSourceOverrideMode": "Legacy",
	}}, nil); err != nil {
		t.Fatal(err)
	}
	boots := l.Host.Boots()
	if err := b.Reset(t.Context(), schema.ResetPowerCycle); err != nil {
		t.Fatal(err)
	}
	if got := inserted(); got != "cd.iso" {
		t.Errorf("after a power cycle QEMU has %q in the drive", got)
	}
	if device, _ := l.Host.NextBoot(); device != "" {
		t.Errorf("the override %q was not used up", device)
	}
	time.Sleep(time.Second)
	if l.Host.Boots() != boots {
		t.Error("the host booted its kernel and not from the CD")
	}
	if _, err := b.Post(t.Context(), drive+"/Actions/VirtualMedia.EjectMedia", map[string]any{}, nil); err != nil || inserted() != "" {
		t.Errorf("eject = %v; QEMU has %q in the drive", err, inserted())
	}
	if err := b.Reset(t.Context(), schema.ResetPowerCycle); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Host.WaitBoot(t.Context(), boots); err != nil {
		t.Errorf("the next boot is not from the kernel again: %v", err)
	}
}
