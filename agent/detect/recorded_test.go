package detect

import (
	"compress/gzip"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// The series in testdata were taken from stock kernels in QEMU (agent/engine, -record). Their names say what must come of
// them: fire-DETECTOR-KERNEL at the latest at the end of the series, silent-WHAT-KERNEL never.
func TestRecorded(t *testing.T) {
	files, err := filepath.Glob("testdata/*.json.gz")
	if err != nil || len(files) == 0 {
		t.Fatalf("no recorded series: %v", err)
	}
	c := DefaultConfig()
	c.RunawayFor = 3 * time.Second
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			f, err := os.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			z, err := gzip.NewReader(f)
			if err != nil {
				t.Fatal(err)
			}
			var whole Pass
			if err := json.NewDecoder(z).Decode(&whole); err != nil {
				t.Fatal(err)
			}
			fired := map[string]Finding{}
			for i := range whole.Beats {
				at := whole.Beats[i].At
				p := Pass{Now: at, Panic: whole.Panic, Beats: whole.Beats[:i+1]}
				for _, s := range whole.Tasks {
					if !s.At.After(at) {
						p.Tasks = append(p.Tasks, s)
					}
				}
				for _, u := range whole.Usage {
					if !u.At.After(at) {
						p.Usage = append(p.Usage, u)
					}
				}
				for _, d := range Detectors(c) {
					if slices.Contains(d.Needs, NeedUsage) && len(p.Usage) == 0 || slices.Contains(d.Needs, NeedSigns) {
						continue
					}
					if slices.Contains(d.Needs, NeedTasks) && len(p.Tasks) == 0 {
						continue
					}
					fs, err := d.Detect(t.Context(), &p)
					if err != nil {
						continue
					}
					for _, f := range fs {
						if _, ok := fired[d.ID]; !ok && !f.Suspicion {
							fired[d.ID] = f
							t.Logf("%s after %v: %s", d.ID, at.Sub(whole.Beats[0].At), f.Title)
						}
					}
				}
			}
			base := filepath.Base(file)
			if strings.HasPrefix(base, "silent-") {
				if len(fired) > 0 {
					t.Errorf("fired: %+v", fired)
				}
				return
			}
			want := ""
			for id := range fired {
				if strings.HasPrefix(base, "fire-"+id+"-") {
					want = id
				}
			}
			if want == "" {
				t.Errorf("what it is named for was not found; fired: %+v", fired)
			}
		})
	}
}
