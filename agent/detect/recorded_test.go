package detect

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// The series in testdata were taken from stock kernels in QEMU (tests/faults, -record), and cut to the last seconds and samples by which their findings
// are still made. Their names say what must come of them: fire-KIND-FAULT-KERNEL at the latest at the end of the series, silent-WHAT-KERNEL never. Of each
// kind there is one, but for those that need a network, or no kernel, and rcu-stall, before which a soft lockup is found.
func TestRecorded(t *testing.T) {
	files, err := filepath.Glob("testdata/*.json.gz")
	if err != nil || len(files) == 0 {
		t.Fatalf("no recorded series: %v", err)
	}
	// As tests/faults has them: the faults are not waited for as long as customers would, and an emulated CPU waits for a real one, too.
	eager, customers, patient := DefaultConfig(), DefaultConfig(), DefaultConfig()
	eager.RunawayFor, eager.RunawayShare, eager.HungFor = 3*time.Second, 0.5, 4*time.Second
	eager.WorkFor, eager.IOFor, eager.BootFor = 8*time.Second, 8*time.Second, 15*time.Second
	customers.RunawayFor = 3 * time.Second
	patient.StallVerdict, patient.Silent = 5*time.Second, 15*time.Second
	missing := slices.DeleteFunc(Kinds(), func(k Kind) bool {
		return slices.Contains([]Kind{KindNetworkFlood, KindNetworkScan, KindNetworkSilent, KindPolicy, KindRCUStall}, k) ||
			slices.ContainsFunc(files, func(file string) bool { return strings.HasPrefix(filepath.Base(file), "fire-"+string(k)+"-") })
	})
	if len(missing) > 0 {
		t.Errorf("nothing recorded of %v", missing)
	}
	// How the key of what is found begins, where its kind alone does not say that it is the right one.
	keys := map[string]string{"notifier": "probe ", "packet-filter": "probe ", "tracepoint": "probe ", "give-root": "cred ", "share-cred": "cred ", "root-cred": "cred ",
		"hide-module": "module ", "hide-task": "task ", "hide-socket": "rodata ", "slab-leak": "slab", "fd-leak": "files", "files": "files", "pids": "pids",
		"threads": "threads", "conntrack": "conntrack", "tmpfs": "tmpfs", "syn-flood": "syn-flood", "memory-stall": "pressure", "starved": "starved"}
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
			base := filepath.Base(file)
			c := eager
			switch {
			case strings.HasPrefix(base, "silent-healthy-"):
				c = patient
			case strings.HasPrefix(base, "silent-"):
				c = customers
			}
			fired := map[string]Finding{}
			Replay(t.Context(), c, whole, nil, func(at time.Time, d *Detector, found []Finding) bool {
				for _, f := range found {
					id := string(f.Kind) + "-" + f.Key
					if _, ok := fired[id]; !ok && !f.Suspicion {
						fired[id] = f
						t.Logf("%s after %v: %s", f.Kind, at.Sub(whole.Beats[0].At), f.Title)
					}
				}
				return true
			})
			if strings.HasPrefix(base, "silent-") {
				if len(fired) > 0 {
					t.Errorf("fired: %+v", fired)
				}
				return
			}
			for _, f := range fired {
				fault, ok := strings.CutPrefix(base, "fire-"+string(f.Kind)+"-")
				if !ok {
					continue
				}
				i := strings.LastIndex(fault, "-")
				if i < 0 || strings.HasPrefix(f.Key, keys[fault[:i]]) {
					return
				}
			}
			t.Errorf("what it is named for was not found; fired: %+v", fired)
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
