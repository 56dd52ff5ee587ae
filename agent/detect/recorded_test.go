package detect

import (
	"bytes"
	"os"
	"path/filepath"
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
			whole, err := ReadRecording(f)
			if err != nil {
				t.Fatal(err)
			}
			fired := map[string]Finding{}
			Replay(t.Context(), c, whole, nil, func(at time.Time, d *Detector, found []Finding) bool {
				for _, f := range found {
					if _, ok := fired[d.ID]; !ok && !f.Suspicion {
						fired[d.ID] = f
						t.Logf("%s after %v: %s", d.ID, at.Sub(whole.Beats[0].At), f.Title)
					}
				}
				return true
			})
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

// Whatever is handed in as a recording, reading and judging it ends.
func FuzzRecording(f *testing.F) {
	f.Add([]byte(`{"now":"2026-01-01T00:00:00Z","beats":[{"at":"2026-01-01T00:00:00Z","cpus":[{"online":true}]},{"at":"2026-01-01T00:00:01Z","cpus":[]}],"tasks":[{"tasks":[{"pid":1}]}],"usage":[{}],"signs":[{}]}`))
	f.Add([]byte{0x1f, 0x8b, 8})
	f.Fuzz(func(t *testing.T, b []byte) {
		whole, err := ReadRecording(bytes.NewReader(b))
		if err != nil || len(whole.Beats) > 100 || len(whole.Usage) > 100 || len(whole.Tasks) > 100 {
			return
		}
		Replay(t.Context(), DefaultConfig(), whole, nil, func(time.Time, *Detector, []Finding) bool { return true })
	})
}
