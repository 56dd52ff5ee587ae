package detect

import (
	"context"
	"fmt"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// MemorySample is what the kernel's EDAC drivers had counted of the host's memory once.
type MemorySample struct {
	At          time.Time                 `json:"at"` // the reader's clock
	Controllers []kernel.MemoryController `json:"controllers"`
}

// MemoryKept is how long samples of memory's errors are kept, and how long those that are kept lie apart.
const (
	MemoryKept  = 24 * time.Hour
	MemoryApart = 15 * time.Minute
)

const memoryEvery = 2 * time.Second

// ailing is a part of the host's memory: a module, a rank of one, or what a controller could not tell the place of.
type ailing struct {
	key, name                  string
	since                      time.Duration // how long its controller's driver has counted
	correctable, uncorrectable uint64
}

// parts returns what a sample counts errors of.
func (s MemorySample) parts() []ailing {
	var all []ailing
	for _, c := range s.Controllers {
		mc := fmt.Sprintf("mc%d", c.Index)
		all = append(all, ailing{mc, fmt.Sprintf("memory behind controller %s (%s), somewhere", mc, c.Name), c.Since, c.CorrectableUnplaced, c.UncorrectableUnplaced})
		kind := "dimm"
		if c.PerRank {
			kind = "rank"
		}
		for _, m := range c.Modules {
			key := fmt.Sprintf("%s/%s%d", mc, kind, m.Index)
			name := "memory module " + key
			if m.Label != "" {
				name = fmt.Sprintf("memory module %q (%s)", m.Label, key)
			}
			all = append(all, ailing{key, name, c.Since, m.Correctable, m.Uncorrectable})
		}
	}
	return all
}

// memoryErrors reports memory that has lost data since its driver began to count, and memory that has had many errors corrected within a day: as
// many as [Config.CorrectedADay], which by default is what mcelog takes for too many of one module.
func memoryErrors(c Config) Detector {
	return Detector{
		ID: "memory-errors", Title: "Memory fails", Kind: KindHardware, Severity: Critical,
		Every: memoryEvery, Clear: 10 * time.Second, DependsOn: []Kind{KindPanic, KindHostSilent}, Needs: []Need{NeedMemory},
		Detect: func(_ context.Context, p *Pass) ([]Finding, error) {
			now := p.Memory[len(p.Memory)-1]
			var out []Finding
			for i, part := range now.parts() {
				f := Finding{
					Key: part.key, Kind: KindHardware, Confidence: 0.95,
					Evidence: []Evidence{{"uncorrectable", fmt.Sprint(part.uncorrectable)}, {"correctable", fmt.Sprint(part.correctable)}},
				}
				within, since := part.lately(i, p.Memory)
				switch {
				case part.uncorrectable > 0:
					f.Severity, f.Title = Critical, part.name+" has lost data"
					f.Detail = fmt.Sprintf("%d of its errors could not be corrected: what lay there is lost, and whoever used it may have gone on with something else", part.uncorrectable)
				case within >= uint64(c.CorrectedADay):
					f.Severity, f.Title = Warning, part.name+" is failing"
					f.Detail = fmt.Sprintf("%d of its errors were corrected within %v; a sound module has hardly any, and one that has many may lose data next", within, since.Round(time.Minute))
				default:
					continue
				}
				out = append(out, f)
			}
			return out, nil
		},
	}
}

// lately returns how many errors of a part were corrected within the time that is known of, a day at most, and how long that is. The part is
// number i of the newest sample's.
func (a ailing) lately(i int, samples []MemorySample) (n uint64, within time.Duration) {
	if a.since <= MemoryKept { // what was counted before the first sample was within a day, too
		return a.correctable, a.since
	}
	last := samples[len(samples)-1]
	for _, s := range samples { // the oldest in which it is the same part, and was not set to zero since
		parts := s.parts()
		if i < len(parts) && parts[i].key == a.key && parts[i].correctable <= a.correctable {
			return a.correctable - parts[i].correctable, last.At.Sub(s.At)
		}
	}
	return 0, 0
}
