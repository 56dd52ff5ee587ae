package engine

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

var recordFlag = flag.String("record", "", "`directory` to put series of samples of the guests in, for the tests of package detect")

// Records what detectors are to judge: healthy hosts and ill ones.
func TestLiveRecord(t *testing.T) {
	if *recordFlag == "" {
		t.Skip("makes test data: ask for it with -record=DIR and -guests")
	}
	forEachGuest(t, func(t *testing.T, k string) {
		g := startGuest(t, k)
		img, err := kernel.Open(t.Context(), g.Memory(false), kernel.Options{})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		record(t, img, "silent-idle-"+k, 10*time.Second)
		g.Spawn("spin")
		time.Sleep(500 * time.Millisecond)
		record(t, img, "fire-runaway-process-"+k, 5*time.Second)
		// Among others it does not get its share any more.
		g.Spawn("forks")
		g.Spawn("forks")
		g.Spawn("forks")
		time.Sleep(500 * time.Millisecond)
		record(t, img, "silent-contended-"+k, 6*time.Second)
		g.Execute("stop")
		record(t, img, "fire-host-silent-"+k, 7*time.Second)
		g.Execute("cont")
		v := img.View(t.Context())
		g.Lock(gadget(t, v), func(cpu int) bool {
			hb, err := v.Heartbeat()
			return err == nil && !hb.CPUs[cpu].Idle
		})
		record(t, img, "fire-cpu-stall-"+k, 4*time.Second)
	})
}

// Records what takes the host with it, if nobody stops it.
func TestLiveRecordExhaustion(t *testing.T) {
	if *recordFlag == "" {
		t.Skip("makes test data: ask for it with -record=DIR and -guests")
	}
	for _, fault := range [][2]string{{"hog", "fire-memory-hog"}, {"bomb", "fire-fork-bomb"}, {"rootload", "silent-build"}, {"rootbase", "silent-database"}} {
		forEachGuest(t, func(t *testing.T, k string) {
			g := startGuest(t, k)
			img, err := kernel.Open(t.Context(), g.Memory(false), kernel.Options{})
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(3 * time.Second)
			g.Say("spawn " + fault[0])
			record(t, img, fault[1]+"-"+k, 4*time.Second)
		})
	}
}

// record takes samples as the engine does and stores them as one Pass.
func record(t *testing.T, img *kernel.Image, name string, d time.Duration) {
	t.Helper()
	var p detect.Pass
	next := time.Now()
	for end := next.Add(d); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		v := img.View(context.Background())
		if hb, err := v.Heartbeat(); err == nil {
			p.Beats = append(p.Beats, hb)
		}
		if s, err := v.Panic(); err == nil {
			p.Panic = &s
		}
		if u, err := v.Usage(); err == nil {
			p.Usage = append(p.Usage, u)
		}
		if now := time.Now(); !now.Before(next) || detect.DefaultConfig().Hurry(p.Usage, p.Tasks) {
			next = now.Add(500 * time.Millisecond)
			if s, err := taskSample(v, nil); err == nil {
				if n := len(p.Usage); n > 0 {
					s.Mapped = mapped(v, s.Tasks, p.Usage[n-1].Total)
				}
				p.Tasks = append(p.Tasks, s)
			}
		}
		p.Now = time.Now()
	}
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if err := json.NewEncoder(z).Encode(p); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(*recordFlag, name+".json.gz"), b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}
