package detect

import (
	"errors"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// traffic makes samples, one each 200 ms for 40 s, from what the host does in each.
func traffic(step func(i int, s *NetworkSample)) []NetworkSample {
	t0 := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	var all []NetworkSample
	s := NetworkSample{Last: t0}
	for i := range 200 {
		s.At = t0.Add(time.Duration(i) * 200 * time.Millisecond)
		step(i, &s)
		all = append(all, s)
	}
	return all
}

func beats(from, to time.Time, moves bool) []kernel.Heartbeat {
	var all []kernel.Heartbeat
	for at := from; !at.After(to); at = at.Add(50 * time.Millisecond) {
		b := kernel.Heartbeat{At: at, Mono: 7}
		if moves {
			b.Mono = at.UnixNano()
		}
		all = append(all, b)
	}
	return all
}

func TestNetworkDetectors(t *testing.T) {
	sends := func(s *NetworkSample, frames uint64) {
		s.Sent, s.Forwarded, s.Last = s.Sent+frames, s.Forwarded+frames, s.At
	}
	for _, c := range []struct {
		name  string
		moves bool // the host's kernel goes on
		step  func(i int, s *NetworkSample)
		want  string // the detector that speaks at the end; empty if none does
	}{
		{"a busy server", true, func(_ int, s *NetworkSample) { sends(s, 20000); s.SYN += 300 }, ""},
		{"many connections that are used", true, func(_ int, s *NetworkSample) { sends(s, 2000); s.SYN += 400 }, ""},
		{"a SYN flood", true, func(_ int, s *NetworkSample) { sends(s, 400); s.SYN += 400 }, "network-flood"},
		{"a scan whose answers are refused", true, func(_ int, s *NetworkSample) { sends(s, 800); s.SYN += 400; s.RST += 300 }, "network-flood"},
		{"a scan that nobody answers", true, func(_ int, s *NetworkSample) { sends(s, 4); s.SYN += 4; s.Opened += 4 }, "network-scan"},
		{"a slow scan that is refused", true, func(_ int, s *NetworkSample) {
			sends(s, 2)
			s.SYN, s.Opened, s.Answered, s.Refused = s.SYN+2, s.Opened+2, s.Answered+2, s.Refused+2
		}, "network-scan"},
		{"many conversations with many", true, func(_ int, s *NetworkSample) { sends(s, 40); s.Opened += 8; s.Answered += 7 }, ""},
		{"a few that nobody answers", true, func(i int, s *NetworkSample) { sends(s, 1); s.Opened = uint64(i / 2) }, ""},
		{"a scan that is over", true, func(i int, s *NetworkSample) { sends(s, 1); s.Opened = uint64(min(i, 80) * 4) }, ""},
		{"a flood of frames", true, func(_ int, s *NetworkSample) { sends(s, 50000) }, "network-flood"},
		{"a burst", true, func(i int, s *NetworkSample) {
			if i == 198 {
				sends(s, 300000)
			}
		}, ""},
		{"a flood that is kept back", true, func(_ int, s *NetworkSample) { s.Sent += 50000; s.SYN += 5000; s.Last = s.At }, ""},
		{"a flood that is kept back to little", true, func(_ int, s *NetworkSample) {
			s.Sent, s.Forwarded, s.SYN, s.Last = s.Sent+50000, s.Forwarded+100, s.SYN+50000, s.At
		}, ""},
		{"nobody speaks", true, func(int, *NetworkSample) {}, ""},
		{"a host that does not answer", true, func(i int, s *NetworkSample) { s.Asked = uint64(i / 10) }, "network-silent"},
		{"a dead host that does not answer", false, func(i int, s *NetworkSample) { s.Asked = uint64(i / 10) }, ""},
		{"a dead host that sends", false, func(_ int, s *NetworkSample) { sends(s, 1) }, "network-alive"},
		{"a live host that sends", true, func(_ int, s *NetworkSample) { sends(s, 1) }, ""},
		{"a host that died just now", false, func(i int, s *NetworkSample) {
			if i < 190 {
				sends(s, 1)
			}
		}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := Pass{Network: traffic(c.step)}
			p.Now = p.Network[len(p.Network)-1].At
			p.Beats = beats(p.Now.Add(-8*time.Second), p.Now, c.moves)
			said := ""
			for _, d := range NetworkDetectors(DefaultConfig()) {
				found, err := d.Detect(t.Context(), &p)
				if err != nil && !errors.Is(err, ErrTooEarly) {
					t.Errorf("%s: %v", d.ID, err)
				}
				if len(found) > 0 {
					said += d.ID
				}
			}
			if said != c.want {
				t.Errorf("spoke: %q; want %q", said, c.want)
			}
		})
	}
	// A counter that begins anew is no flood.
	p := Pass{Network: traffic(func(i int, s *NetworkSample) { s.Sent, s.Forwarded = uint64(1000000-i), uint64(1000000-i) })}
	if found, err := networkFlood(DefaultConfig()).Detect(t.Context(), &p); err != nil || len(found) > 0 {
		t.Errorf("counters that fall: %v, %v", found, err)
	}
}
