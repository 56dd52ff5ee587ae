package detect

import (
	"context"
	"fmt"
	"time"
)

// NetworkSample is what the packet path between the host and the wire has seen of the host once. The counts are since that path began.
type NetworkSample struct {
	At time.Time `json:"at"`
	// Last is when the host sent its latest frame; zero if it has sent none.
	Last time.Time `json:"last,omitzero"`
	// Sent are the frames of the host, Forwarded those of them that got to the wire.
	Sent, Forwarded uint64
	// SYN and RST are segments of TCP that the host sent, whatever became of them.
	SYN, RST uint64
	// Asked are the packets of others in conversations in which the host has had its say before.
	Asked uint64
	// Opened are the conversations that the host began, Answered those of them in which the other side has said anything, Refused those of the
	// answered that were broken off at once.
	Opened, Answered, Refused uint64
}

// How long each sample of the network is kept, and how long a state of it must last.
const (
	NetworkKept = 30 * time.Second

	floodFor      = 2 * time.Second
	silentFor     = 15 * time.Second // that a host sends nothing though it is spoken to
	silentAsked   = 3                // packets to it meanwhile
	deadFor       = 3 * time.Second  // that a dead host sends
	scanFor       = 20 * time.Second // in which so many conversations come to nothing:
	scanLeast     = 100
	scanAnswer    = 2 * time.Second // that another has to answer
	networkMostly = 2               // a conversation has more than this many frames of the host for each that opens or breaks one off
)

// NetworkDetectors returns the detectors that need the packet path between the host and the wire.
func NetworkDetectors(c Config) []Detector {
	return []Detector{networkFlood(c), networkScan(c), networkSilent(c), networkAlive(c)}
}

// networkBefore returns the newest sample that is at least d older than the last one.
func networkBefore(samples []NetworkSample, d time.Duration) (NetworkSample, bool) {
	last := samples[len(samples)-1]
	for i := len(samples) - 1; i >= 0; i-- {
		if last.At.Sub(samples[i].At) >= d {
			return samples[i], true
		}
	}
	return NetworkSample{}, false
}

// networkFlood reports a host that floods others: by sheer numbers, or by opening connections that it does not use, as a SYN flood and a
// scan do. Only what gets to the wire counts, so that a flood that is kept back is one no more.
func networkFlood(c Config) Detector {
	return Detector{
		ID: "network-flood", Title: "Flood of the network", Kind: KindNetworkFlood, Severity: Critical, Needs: []Need{NeedNetwork}, Clear: time.Second,
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			now := p.Network[len(p.Network)-1]
			was, ok := networkBefore(p.Network, floodFor)
			if !ok {
				return nil, ErrTooEarly
			}
			// The first half of the time must show it as well as the whole.
			half, _ := networkBefore(p.Network, floodFor/2)
			f1, why1 := c.flood(was, half)
			f2, why2 := c.flood(half, now)
			if !f1 || !f2 {
				return nil, nil
			}
			return []Finding{{
				Key: "host", Kind: KindNetworkFlood, Severity: Critical, Confidence: 0.9,
				Title:    "the host floods the network: " + why2,
				Detail:   "For " + floodFor.String() + " on end the host has sent " + why2 + " (" + why1 + " in the first half). Only frames that reached the wire are counted.",
				Evidence: []Evidence{{"sent", why2}},
			}}, nil
		},
	}
}

// flood judges the time between two samples.
func (c Config) flood(a, b NetworkSample) (bool, string) {
	secs := b.At.Sub(a.At).Seconds()
	sent, forwarded := b.Sent-a.Sent, b.Forwarded-a.Forwarded
	if secs <= 0 || sent == 0 || forwarded == 0 || b.Sent < a.Sent || b.Forwarded < a.Forwarded {
		return false, ""
	}
	share := float64(forwarded) / float64(sent) / secs
	packets, opens := float64(forwarded)/secs, float64(b.SYN-a.SYN)*share
	switch control := (b.SYN - a.SYN) + (b.RST - a.RST); {
	case opens >= float64(c.FloodSYNs) && control*networkMostly >= sent:
		return true, fmt.Sprintf("%.0f requests for connections a second, and hardly anything else", opens)
	case packets >= float64(c.FloodPackets):
		return true, fmt.Sprintf("%.0f frames a second", packets)
	}
	return false, ""
}

// networkScan reports a host that begins conversations, each with another port or address, most of which nobody answers or the other side breaks off
// at once: it looks for what it could speak to. What is kept back is no scan.
func networkScan(Config) Detector {
	return Detector{
		ID: "network-scan", Title: "Scan of the network", Kind: KindNetworkScan, Severity: Warning, Every: time.Second, Clear: 2 * time.Second,
		DependsOn: []Kind{KindNetworkFlood}, Needs: []Need{NeedNetwork},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			now := p.Network[len(p.Network)-1]
			until, ok := networkBefore(p.Network, scanAnswer)
			if !ok {
				return nil, ErrTooEarly
			}
			was, ok := networkBefore(p.Network, scanFor)
			if !ok {
				was = p.Network[0]
			}
			opened, answered, refused := until.Opened-was.Opened, now.Answered-was.Answered, now.Refused-was.Refused
			if until.Opened < was.Opened || now.Answered < was.Answered || refused > answered {
				return nil, nil // the path has begun anew
			}
			useful := answered - refused
			if opened < scanLeast || useful*4 > opened {
				return nil, nil
			}
			return []Finding{{
				Key: "host", Kind: KindNetworkScan, Severity: Warning, Confidence: 0.8,
				Title: "the host scans the network",
				Detail: fmt.Sprintf("Within %v it has begun %d conversations, each with another port or address, of which %d came to something; %d were refused.",
					until.At.Sub(was.At).Round(time.Second), opened, useful, refused),
				Evidence: []Evidence{{"begun", fmt.Sprint(opened)}, {"answered", fmt.Sprint(answered)}, {"refused", fmt.Sprint(refused)}},
			}}, nil
		},
	}
}

// networkSilent reports a host that lives and is spoken to, and sends nothing: its network is dead.
func networkSilent(Config) Detector {
	return Detector{
		ID: "network-silent", Title: "Host without network", Kind: KindNetworkSilent, Severity: Warning, Every: time.Second,
		DependsOn: []Kind{KindPanic, KindHostSilent}, Needs: []Need{NeedNetwork, NeedHeartbeats},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			now := p.Network[len(p.Network)-1]
			was, ok := networkBefore(p.Network, silentFor)
			if !ok {
				return nil, ErrTooEarly
			}
			if now.Last.IsZero() || now.At.Sub(now.Last) < silentFor || now.Asked < was.Asked+silentAsked {
				return nil, nil
			}
			if n := len(p.Beats); n < 2 || p.Beats[n-1].Mono == p.Beats[0].Mono {
				return nil, ErrTooEarly // whether it lives is for others to say
			}
			quiet := now.At.Sub(now.Last).Round(time.Second)
			return []Finding{{
				Key: "host", Kind: KindNetworkSilent, Severity: Warning, Confidence: 0.8,
				Title: fmt.Sprintf("the host runs, and has sent nothing for %v though others speak to it", quiet),
				Detail: fmt.Sprintf("Its kernel goes on, and %d packets of conversations that it has had came for it, but not one frame from it. "+
					"Its driver or its interface is down.", now.Asked-was.Asked),
				Evidence: []Evidence{{"last_frame", now.Last.UTC().Format(time.RFC3339)}, {"unanswered", fmt.Sprint(now.Asked - was.Asked)}},
			}}, nil
		},
	}
}

// networkAlive reports a host that sends though its memory shows it dead: what is watched is not what runs.
func networkAlive(c Config) Detector {
	return Detector{
		ID: "network-alive", Title: "Traffic of a dead host", Kind: KindTampering, Severity: Critical, Every: time.Second,
		Needs: []Need{NeedNetwork, NeedHeartbeats},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			s := p.series(c, c.lenient())
			if s.watched() < deadFor {
				return nil, ErrTooEarly
			}
			last := s.beats[len(s.beats)-1]
			first, ok := networkBefore(p.Network, deadFor)
			now := p.Network[len(p.Network)-1]
			if !ok {
				return nil, ErrTooEarly
			}
			for i := range s.beats {
				if s.credit[i] <= deadFor && s.beats[i].Mono != last.Mono {
					return nil, nil // it lives
				}
			}
			// It has sent in the last second, and in each before since it stood still.
			half, _ := networkBefore(p.Network, deadFor/2)
			if now.At.Sub(now.Last) > time.Second || half.Sent <= first.Sent || now.Sent <= half.Sent {
				return nil, nil
			}
			return []Finding{{
				Key: "network-alive", Kind: KindTampering, Severity: Critical, Confidence: 0.7,
				Title: "the host sends, and its memory shows a kernel that stands still",
				Detail: fmt.Sprintf("The kernel that is watched has done nothing for %v, in which the host has sent %d frames: another kernel runs there, or the one that is "+
					"seen is a decoy.", deadFor, now.Sent-first.Sent),
				Evidence: []Evidence{{"frames", fmt.Sprint(now.Sent - first.Sent)}},
			}}, nil
		},
	}
}
