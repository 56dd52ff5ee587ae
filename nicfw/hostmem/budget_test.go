package hostmem_test

import (
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// moved is memory that notes when how much was moved.
type moved struct {
	at    []time.Time
	bytes []int
}

func (m *moved) note(n int) { m.at, m.bytes = append(m.at, time.Now()), append(m.bytes, n) }
func (m *moved) ReadAt(p []byte, _ int64) (int, error) {
	m.note(len(p))
	return len(p), nil
}
func (m *moved) WriteAt(p []byte, _ int64) (int, error) {
	m.note(len(p))
	return len(p), nil
}
func (m *moved) Map() []hostmem.Range { return []hostmem.Range{{Size: 1 << 40}} }
func (m *moved) Close() error         { return nil }

// In no stretch of time is more moved than the rate gives, and one burst.
func TestBudgetIsAHardCap(t *testing.T) {
	for _, rate := range []uint64{hostmem.BudgetFloor, 5 << 20, 200 << 20} {
		synctest.Test(t, func(t *testing.T) {
			m := &moved{}
			b := hostmem.Budget(m, rate)
			w, _ := hostmem.AsWriter(b)
			r := rand.New(rand.NewPCG(rate, 1))
			began := time.Now()
			want := 0
			for range 300 {
				n := 1 + r.IntN(200000)
				switch r.IntN(4) {
				case 0:
					b.ReadAt(make([]byte, n), 0)
				case 1:
					segs := make([]hostmem.Segment, 1+r.IntN(20))
					n = 0
					for i := range segs {
						segs[i].Buf = make([]byte, r.IntN(9000))
						n += len(segs[i].Buf)
					}
					hostmem.ReadScatter(b, segs)
				case 2:
					n = 64
					w.WriteAt(make([]byte, n), 0)
				case 3:
					n = 0
					time.Sleep(time.Duration(r.IntN(100)) * time.Millisecond)
				}
				want += n
			}
			total := 0
			for _, n := range m.bytes {
				total += n
			}
			if total != want {
				t.Fatalf("rate %d: %d bytes were moved of %d", rate, total, want)
			}
			burst := max(float64(4*hostmem.PageSize), float64(rate)*0.05)
			const stores = 64 * 300 // do not wait
			for i := range m.at {
				sum := 0.0
				for j := i; j < len(m.at); j++ {
					sum += float64(m.bytes[j])
					if most := float64(rate)*m.at[j].Sub(m.at[i]).Seconds() + burst + stores + 1; sum > most {
						t.Fatalf("rate %d: %.0f bytes were moved in %v; at most %.0f may be", rate, sum, m.at[j].Sub(m.at[i]), most)
					}
				}
			}
			// Nor is it much slower than it has to be.
			if took, least := time.Since(began).Seconds(), float64(total)/float64(rate); took > least+300*0.1 {
				t.Errorf("rate %d: %d bytes took %.1f s; %.1f s would do", rate, total, took, least)
			}
		})
	}
}
