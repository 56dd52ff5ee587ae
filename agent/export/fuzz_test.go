package export

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// FuzzParsers gives the same bytes to every parser of what comes from the network.
func FuzzParsers(f *testing.F) {
	h := healthV1()
	key := Key{"ops", [KeySize]byte{1}}
	now := time.Unix(1700000000, 0)
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	f.Add(h.append(nil))
	f.Add(key.token(now, Request{Kind: KindActions}, a, b))
	f.Add(message{typeRequest, false, 1, []byte(`{"op":"heal","args":{"finding":"x"}}`)}.bytes())
	f.Add((&lease{Lease: Lease{ID: "0102030405060708", Kind: KindHealth}}).private())
	f.Add(rejection(now, "no"))
	ram := ramMap([]hostmem.Range{{Start: 0x1000, Size: 0x1000}, {Start: 0x8000, Size: 8}}, 0, 1<<40)
	m := make([]byte, ram.Len())
	ram.ReadAt(m, 0)
	f.Add(m)
	f.Fuzz(func(t *testing.T, p []byte) {
		if h, err := ParsePage(p); err == nil {
			if len(h.CPUs) > maxCPUs || len(h.Open) > maxFindings {
				t.Fatalf("page of %d CPUs and %d findings", len(h.CPUs), len(h.Open))
			}
			if again, err := ParsePage(h.append(nil)); err != nil || again.Sequence != h.Sequence || len(again.Open) != len(h.Open) {
				t.Fatalf("page %+v becomes %+v, %v", h, again, err)
			}
		}
		if s, err := ParseSummary(p); err == nil && (s.Version != PageVersion || s.Verdict > Ill) {
			t.Fatalf("summary %+v", s)
		}
		ts := newTokens([]Key{key})
		if r, err := ts.check(now, p, a, b); err == nil {
			if r.User != "ops" || !bytes.Equal(p[:tokenLen][tokenBody:], key.mac(p[:tokenBody], a, b)) {
				t.Fatalf("token asks for %+v", r)
			}
		}
		if m, err := parseMessage(p); err == nil {
			if !bytes.Equal(m.bytes(), p) {
				t.Fatalf("message % x becomes % x", p, m.bytes())
			}
			var r request
			var q HealRequest
			if strict(m.data, &r) == nil && r.Args != nil {
				_ = strict(r.Args, &q)
			}
		}
		if l, err := parsePrivate(p); err == nil {
			back := lease{Lease: l}
			if got, err := parsePrivate(back.private()); err != nil || got != l {
				t.Fatalf("reply %+v becomes %+v, %v", l, got, err)
			}
		}
		parseRejection(p)
		if rs, err := ParseRAMMap(p); err == nil {
			end := hostmem.PhysAddr(0)
			for _, r := range rs {
				if r.Size == 0 || r.Start < end || r.End() < r.Start {
					t.Fatalf("RAM map %v", rs)
				}
				end = r.End()
			}
		}
	})
}
