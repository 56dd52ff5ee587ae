package tests

import (
	"context"
	"flag"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/images/builder"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/tests/lab"
	"github.com/backdoor-rhs/backdoor/tests/operator"
)

var ipmiFlag = flag.Bool("ipmi", false, "boot the DPU from the image with ipmitool, too")

// TestIPMI boots the DPU from the image that has ipmitool, where the host's BMC has nothing but IPMI (ipmi_sim): the host is switched by
// Redfish through agent, ipmitool and LAN+, and QEMU's process table says whether it was.
func TestIPMI(t *testing.T) {
	if !*ipmiFlag {
		t.Skip("builds an image of its own and boots the lab once more, which takes minutes: make ipmi does")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	img, err := builder.Lookup("dpu-arm64-ipmi")
	if err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	m, err := builder.Build(ctx, img, builder.Options{Module: "..", Out: out})
	if err != nil {
		t.Fatal(err)
	}
	l, err := lab.Up(ctx, lab.Config{DPUImage: filepath.Join(out, m.Initramfs.Name), DPUKernel: filepath.Join(out, m.Kernel.Name), IPMI: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	defer func() {
		if t.Failed() {
			t.Logf("the DPU's console ends with\n%s", strings.Join(l.DPU.Console().Tail(30), "\n"))
		}
	}()
	a, err := operator.DialDPU(ctx, l.DPU)
	if err != nil {
		t.Fatal(err)
	}
	power := func() schema.PowerState {
		t.Helper()
		s, err := a.System(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return s.PowerState
	}
	if got := power(); got != schema.PowerOn {
		t.Errorf("the power of a host that runs is %q", got)
	}
	for _, order := range []struct {
		reset schema.ResetType
		on    bool
		power schema.PowerState
	}{{schema.ResetForceOff, false, schema.PowerOff}, {schema.ResetOn, true, schema.PowerOn}} {
		if err := a.Reset(ctx, order.reset); err != nil {
			t.Fatalf("%s: %v", order.reset, err)
		}
		if l.Host.Powered() != order.on {
			t.Errorf("after %s the host's power is %v", order.reset, l.Host.Powered())
		}
		if got := power(); got != order.power {
			t.Errorf("after %s the agent says that the power is %q", order.reset, got)
		}
	}
	if s, err := a.System(ctx); err != nil || s.Boot != nil || s.VirtualMedia != nil {
		t.Errorf("a BMC without Redfish has a boot override %+v and media %+v, %v", s.Boot, s.VirtualMedia, err)
	}
}
