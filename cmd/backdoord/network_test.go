package main

import (
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/backdoor-rhs/backdoor/boot"
	"github.com/backdoor-rhs/backdoor/cmd/backdoord/config"
)

// TestNetworkChange wants a change in the configuration file at once, and on the machine a moment later.
func TestNetworkChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "config.json")
		cfg := config.Default()
		old := boot.Interface{Match: "52:54:00:bd:00:01", Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.2.15/24")}, Gateway: netip.MustParseAddr("10.0.2.2"), MTU: 9000}
		cfg.Boot = boot.Config{Hostname: "dpu", Interfaces: []boot.Interface{old, {Match: "eth1", DHCP: true}}}
		if err := cfg.Write(path); err != nil {
			t.Fatal(err)
		}
		n := newNetwork(path, slog.New(slog.DiscardHandler))
		var mu sync.Mutex
		var did []string       // guarded by mu
		var now boot.Interface // guarded by mu
		told := func() []string {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(did)
		}
		tell := func(what string) {
			mu.Lock()
			defer mu.Unlock()
			did = append(did, what)
		}
		n.setHostname = func(name string) error { tell("hostname " + name); return nil }
		n.nameServers = func(s []netip.Addr) error { tell("servers " + s[0].String()); return nil }
		n.reconfigure = func(name string, was, is boot.Interface) error {
			tell("addresses of " + name)
			mu.Lock()
			now = is
			mu.Unlock()
			if !slices.Equal(was.Addresses, old.Addresses) {
				t.Errorf("the interface was said to have been %+v", was)
			}
			return nil
		}
		n.hardwareAddr = func(name string) string { return map[string]string{"eth0": "52:54:00:BD:00:01"}[name] }
		s, err := n.Settings("eth0")
		if err != nil || s.HostName != "dpu" || s.DHCP || !slices.Equal(s.Addresses, old.Addresses) || s.Gateway != old.Gateway {
			t.Fatalf("Settings = %+v, %v", s, err)
		}
		if s, err := n.Settings("eth1"); err != nil || !s.DHCP || s.Addresses != nil {
			t.Errorf("Settings(eth1) = %+v, %v", s, err)
		}
		s.HostName, s.NameServers, s.Addresses = "dpu2.example.com", []netip.Addr{netip.MustParseAddr("10.0.2.3")}, []netip.Prefix{netip.MustParsePrefix("10.0.2.16/24")}
		if err := n.Change("eth0", s); err != nil {
			t.Fatal(err)
		}
		if got, err := n.Settings("eth0"); err != nil || got.HostName != s.HostName || !slices.Equal(got.Addresses, s.Addresses) || !slices.Equal(got.NameServers, s.NameServers) {
			t.Errorf("Settings after the change = %+v, %v", got, err)
		}
		if slices.Contains(told(), "addresses of eth0") {
			t.Error("the addresses have changed before the answer is out")
		}
		time.Sleep(applyDelay + time.Millisecond)
		synctest.Wait()
		if got, want := told(), []string{"hostname dpu2.example.com", "servers 10.0.2.3", "addresses of eth0"}; !slices.Equal(got, want) {
			t.Errorf("the machine was told %q; want %q", got, want)
		}
		mu.Lock()
		defer mu.Unlock()
		if now.MTU != 9000 || now.Match != old.Match || !slices.Equal(now.Addresses, s.Addresses) {
			t.Errorf("the interface is to be %+v", now)
		}
		// The other interface is as it was, and what the agent reads at its next start is valid.
		again, err := config.Load(path)
		if err != nil || len(again.Boot.Interfaces) != 2 || !again.Boot.Interfaces[1].DHCP {
			t.Errorf("the configuration is %+v, %v", again.Boot, err)
		}
		s.HostName = "a name"
		if err := n.Change("eth0", s); err == nil {
			t.Error("a configuration that is not valid was kept")
		}
		if again, err := config.Load(path); err != nil || again.Boot.Hostname != "dpu2.example.com" {
			t.Errorf("after a change that was refused: %+v, %v", again.Boot, err)
		}
	})
}
