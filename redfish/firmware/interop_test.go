package firmware

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/url"
	"os"
	"testing"
	"time"

	"github.com/bmc-toolbox/bmclib/v2"
	"github.com/bmc-toolbox/bmclib/v2/constants"

	"github.com/backdoor-rhs/backdoor/boot/slot"
)

// TestBMClib has bmclib, which fleets flash BMCs with, go through its own steps. Its provider for OpenBMC takes no port, so its connections are led
// to the test's.
func TestBMClib(t *testing.T) {
	m := newMachine(t, 1<<20)
	u, err := url.Parse(m.url)
	if err != nil {
		t.Fatal(err)
	}
	web := &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, // as bmclib has it
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", u.Host)
		},
	}}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute) // it refuses to begin with less than ten
	defer cancel()
	c := bmclib.NewClient("dpu.example.com", user, password, bmclib.WithHTTPClient(web))
	c.Registry.Drivers = c.Registry.For("openbmc")
	if err := c.Open(ctx); err != nil {
		t.Fatalf("Open: %v", err)
	}
	defer func() {
		if err := c.Close(context.Background()); err != nil {
			t.Errorf("Close: %v", err)
		}
	}()
	steps, err := c.FirmwareInstallSteps(ctx, "bmc")
	if err != nil || len(steps) != 2 || steps[0] != constants.FirmwareInstallStepUploadInitiateInstall || steps[1] != constants.FirmwareInstallStepInstallStatus {
		t.Fatalf("FirmwareInstallSteps = %v, %v", steps, err)
	}
	flash := func(f *os.File) (state constants.TaskState, status string) {
		t.Helper()
		id, err := c.FirmwareInstallUploadAndInitiate(ctx, "bmc", f)
		if err != nil {
			t.Fatalf("FirmwareInstallUploadAndInitiate: %v", err)
		}
		for range 600 {
			state, status, err = c.FirmwareTaskStatus(ctx, constants.FirmwareInstallStepInstallStatus, "bmc", id, "")
			if err != nil {
				t.Fatalf("FirmwareTaskStatus: %v", err)
			}
			if state == constants.Complete || state == constants.Failed {
				return state, status
			}
			time.Sleep(50 * time.Millisecond)
		}
		return state, status
	}
	if state, status := flash(m.bundle("1.1", nil)); state != constants.Complete {
		t.Errorf("the task ends as %s: %s", state, status)
	}
	if s := m.disk.State(); s.B.Status != slot.Trial || s.B.Version != "1.1" {
		t.Errorf("slot B is %+v", s.B)
	}
	if err := m.verify(slot.B); err != nil {
		t.Error(err)
	}
}
