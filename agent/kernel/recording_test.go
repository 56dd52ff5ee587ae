package kernel

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

var updateFlag = flag.Bool("update", false, "record the guests of -guests anew into testdata")

// A recording has these frames, one after the other, of one kernel.
const (
	frameAlive  = iota // attach, heartbeat, tasks, log, panic state
	frameLater         // heartbeat, proof
	framePanic         // the same kernel after sysrq-c: panic state, tasks
	frameReboot        // another boot of the same kernel: proof
)

// TestRecord makes the recordings:
//
//	go test ./agent/kernel -run TestRecord -update
func TestRecord(t *testing.T) {
	if !*updateFlag {
		t.Skip("rewrites testdata: ask for it with -update")
	}
	forEachGuest(t, func(t *testing.T, kernel string) {
		// Without KASLR the next boot is at the same place.
		start, listings := startListed, listings
		if slices.Contains(objectKernels, kernel) {
			start, listings = startObjects, slices.Concat(listings, objectListings)
		}
		g := start(t, kernel, guestOptions{mib: 256, cmdline: "nokaslr"})
		live := g.attach(Options{}) // past the recorder
		note := live.Info().Note
		label := func(rec *hostmem.Recorder, key string, v any) {
			b, err := json.Marshal(v)
			if err != nil {
				t.Fatal(err)
			}
			rec.Label(key, string(b))
		}
		time.Sleep(5 * time.Second) // until the processes that were just started have come to rest
		var threads []guestThread
		var records []guestRecord
		g.ask(&threads, "ps")
		g.ask(&records, "dmesg")
		modules, mounts := g.read("/proc/modules"), g.read("/proc/1/mountinfo")
		g.rest(live)
		// One kernel is recorded with all its symbols and types.
		for _, l := range listings { // which types they use is seen then
			if _, err := l.ask(live.View(t.Context())); err != nil {
				t.Fatalf("%s: %v", l.name, err)
			}
		}
		mem := hostmem.Memory(g.mem)
		if kernel != "6.1" {
			mem = prune(t, live)
		}
		rec := hostmem.NewRecorder(mem)
		img := g.attachTo(rec, Options{Hint: Hint{Note: note}, NoteOnly: true})
		if _, err := Open(t.Context(), dump{rec, img.note.text}, Options{}); err != nil { // what that looks at is recorded, too
			t.Fatal(err)
		}
		// What tells that there is nothing behind the direct map is recorded, too: damaged pointers lead there.
		_ = img.View(t.Context()).ReadVirt(img.space.linear[1].end+64, make([]byte, 8))
		rec.Label("note", strconv.FormatUint(uint64(note), 10))
		rec.Label("release", img.Info().Release)
		rec.Label("bootID", img.Info().BootID)
		rec.Label("arch", guestMachines[g.kernel.Arch].arch)
		label(rec, "ps", threads)
		label(rec, "dmesg", records)
		rec.Label("modules", modules)
		rec.Label("mounts", mounts)
		pass := func(parts ...func(*View) error) {
			v := img.View(t.Context())
			for _, p := range parts {
				if err := p(v); err != nil {
					t.Fatal(err)
				}
			}
		}
		beat := func(v *View) error { _, err := v.Heartbeat(); return err }
		panicked := func(v *View) error { _, err := v.Panic(); return err }
		tasks := func(v *View) (last error) {
			for _, err := range v.Tasks() {
				last = err
			}
			return last
		}
		log := func(v *View) (last error) {
			for _, err := range v.Log() {
				last = err
			}
			return last
		}
		prove := func(v *View) error { return img.Prove(v.ctx) }
		everything := func(v *View) error {
			for _, l := range listings {
				n, err := l.ask(v)
				if err != nil {
					return fmt.Errorf("%s: %w", l.name, err)
				}
				rec.Label("listing "+l.name, strconv.Itoa(n))
			}
			return nil
		}
		pass(beat, tasks, log, panicked, prove)
		pass(everything)

		rec.NextFrame()
		g.execute("cont")
		time.Sleep(time.Second)
		g.execute("stop")
		pass(beat, prove)

		g.execute("cont")
		g.send("sysrq c")
		g.await(live, func(p PanicState) bool { return p.Panicked })
		time.Sleep(time.Second)
		rec.NextFrame()
		pass(beat, panicked, tasks, prove)
		for _, l := range listings { // for the mutations; the panic may have torn what was being done
			_, _ = l.ask(img.View(t.Context()))
		}

		g.execute("system_reset")
		g.ready()
		rec.NextFrame()
		if err := img.Prove(t.Context()); !errors.Is(err, ErrGone) {
			t.Fatal(err)
		}
		f, err := os.Create(filepath.Join("testdata", kernel+".hostmem"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		n, err := rec.WriteTo(f)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d bytes", f.Name(), n)
	})
}

// rest stops the guest while no process of its userland but those that spin is on a CPU, so that all have a stack.
func (g *guest) rest(img *Image) {
	g.t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		g.execute("stop")
		busy := false
		for task, err := range img.View(context.Background()).Tasks() {
			busy = busy || err != nil || task.OnCPU && task.PID == 1
		}
		if !busy {
			return
		}
		if time.Now().After(end) {
			g.t.Fatal("the guest's init does not come to rest")
		}
		g.execute("cont")
	}
}

// recorded calls f for each recording.
func recorded(tb testing.TB, f func(name string, rec *hostmem.Recording)) {
	tb.Helper()
	files, err := filepath.Glob("testdata/*.hostmem")
	if err != nil || len(files) == 0 {
		tb.Fatalf("no recordings in testdata: %v", err)
	}
	for _, name := range files {
		file, err := os.Open(name)
		if err != nil {
			tb.Fatal(err)
		}
		rec, err := hostmem.OpenRecording(file)
		file.Close()
		if err != nil {
			tb.Fatal(err)
		}
		f(strings.TrimSuffix(filepath.Base(name), ".hostmem"), rec)
	}
}
