package roce

import (
	"math/rand/v2"
	"sync"
	"time"
)

// Impair returns a link that does what l does to fewer packets, more than once or later, in both directions. A corrupt
// packet is a lost one, for links drop those; NewPipe corrupts before the ICRC is checked.
func Impair(l Link, f Faults) Link {
	f.Loss += f.Corrupt
	return &impaired{
		Link: l,
		out:  impairment{f: f, rng: rand.New(rand.NewPCG(f.Seed, 1))},
		in:   impairment{f: f, rng: rand.New(rand.NewPCG(f.Seed, 2))},
	}
}

type impaired struct {
	Link
	sendMu sync.Mutex
	out    impairment // guarded by sendMu
	in     impairment // of Recv
	ready  []Packet   // received and impaired, to be handed up; of Recv
}

// impairment is what happens in one direction.
type impairment struct {
	f    Faults
	rng  *rand.Rand
	late []Packet // held back, to be overtaken
}

// apply adds to out what becomes of packets, whose data it copies.
func (m *impairment) apply(out, packets []Packet) []Packet {
	for _, p := range packets {
		copies := 1
		if m.rng.Float64() < m.f.Dup {
			copies++
		}
		if m.rng.Float64() < m.f.Loss {
			copies--
		}
		overtaken := m.rng.Float64() < m.f.Reorder
		for range copies {
			q := Packet{Peer: p.Peer, Data: append(make([]byte, 0, len(p.Data)+icrcLen), p.Data...)}
			if overtaken {
				m.late = append(m.late, q)
			} else {
				out = append(out, q)
			}
		}
		if len(m.late) > 0 && !overtaken && m.rng.IntN(4) == 0 {
			out = append(out, m.late[0])
			m.late = m.late[1:]
		}
	}
	return out
}

// Counters returns those of the link underneath.
func (i *impaired) Counters() LinkCounters {
	if l, ok := i.Link.(interface{ Counters() LinkCounters }); ok {
		return l.Counters()
	}
	return LinkCounters{}
}

func (i *impaired) Send(packets []Packet) error {
	i.sendMu.Lock()
	defer i.sendMu.Unlock()
	return i.Link.Send(i.out.apply(nil, packets))
}

func (i *impaired) Recv(packets []Packet, wait time.Duration) (int, error) {
	if len(i.ready) == 0 {
		n, err := i.Link.Recv(packets, wait)
		if err != nil {
			return 0, err
		}
		i.ready = i.in.apply(i.ready[:0], packets[:n])
	}
	n := copy(packets, i.ready)
	i.ready = i.ready[n:]
	return n, nil
}
