package main

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/redfish/host"
)

// fakeDatapath has forwarded a little.
type fakeDatapath struct{}

func (fakeDatapath) State() (host.DatapathState, error) {
	return host.DatapathState{Flows: []host.DatapathFlow{}, Counters: []host.DatapathCounter{{Port: "host", Verdict: "forwarded", Frames: 7, Bytes: 700}}}, nil
}

func TestNetwork(t *testing.T) {
	b := newBench(t)
	if code, _, stderr := b.run("login -host $URL -fingerprint $PIN -context dpu -password-file $DIR/initial -new-password-file $DIR/new -save-password", ""); code != exitOK {
		t.Fatalf("login: exit %d: %s", code, stderr)
	}
	for _, c := range []struct {
		line string
		code int
		want heal.NetworkOrder
	}{
		{"network quarantine", exitOK, heal.NetworkOrder{Do: heal.Quarantine, For: heal.ContainFor}},
		{"network quarantine -for 1h -allow 192.0.2.1,198.51.100.0/24", exitOK, heal.NetworkOrder{
			Do: heal.Quarantine, For: time.Hour, Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("198.51.100.0/24")},
		}},
		{"network quarantine -remote [2001:db8::7]:53/udp", exitOK, heal.NetworkOrder{
			Do: heal.Quarantine, For: heal.ContainFor, Remote: &heal.Remote{Addr: netip.MustParseAddr("2001:db8::7"), Proto: 17, Port: 53},
		}},
		{"network limit -rate 1MiB", exitOK, heal.NetworkOrder{Do: heal.RateLimit, For: heal.ContainFor, Rate: 1 << 20, Burst: 1 << 20}},
		{"network release", exitOK, heal.NetworkOrder{Do: heal.Release}},
		{"network limit -rate much", exitUsage, heal.NetworkOrder{}},
		{"network quarantine -remote 192.0.2.1:53", exitUsage, heal.NetworkOrder{}},
		{"network quarantine -allow everybody", exitError, heal.NetworkOrder{}},
		{"network", exitUsage, heal.NetworkOrder{}},
	} {
		before := len(b.agent.orders)
		code, out, stderr := b.run(c.line, "")
		if code != c.code {
			t.Errorf("%s: exit %d: %s%s; want %d", c.line, code, out, stderr, c.code)
			continue
		}
		if c.code == exitOK && (len(b.agent.orders) != before+1 || !cmp.Equal(b.agent.orders[before], c.want, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}))) {
			t.Errorf("%s: ordered %+v; want %+v", c.line, b.agent.orders[before:], c.want)
		}
	}
	code, out, stderr := b.run("network status", "")
	if code != exitOK || !strings.Contains(out, "nothing is kept back") || !strings.Contains(out, "forwarded") {
		t.Errorf("status: exit %d: %s%s", code, out, stderr)
	}
}
