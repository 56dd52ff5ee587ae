package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// TestRecordedHosts runs the verbs on recorded memory of real kernels, and holds the answers against what those hosts said
// of themselves when they were recorded.
func TestRecordedHosts(t *testing.T) {
	files, err := filepath.Glob("../../agent/kernel/testdata/*.hostmem")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Skip("agent/kernel/testdata holds no recordings; the tests there make them with -update")
	}
	for _, path := range files {
		t.Run(filepath.Base(path), func(t *testing.T) {
			mem, err := hostmem.OpenImage(path)
			if err != nil {
				t.Fatal(err)
			}
			labels := mem.(*hostmem.Recording).Labels()
			var threads []struct {
				PID, TGID int
				Comm      string
			}
			var records []struct{ Text string }
			if err := json.Unmarshal([]byte(labels["ps"]), &threads); err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal([]byte(labels["dmesg"]), &records); err != nil {
				t.Fatal(err)
			}
			ask := func(want int, out any, args ...string) {
				t.Helper()
				code, stdout, stderr := command(t, append([]string{"-image", path, "-json"}, args...)...)
				if code != want || stderr != "" {
					t.Fatalf("%v: exit %d: %s; want %d", args, code, stderr, want)
				}
				if err := json.Unmarshal([]byte(stdout), out); err != nil {
					t.Fatalf("%v: %v", args, err)
				}
				if code, stdout, stderr := command(t, append([]string{"-image", path}, args...)...); code != want || stdout == "" || stderr != "" {
					t.Errorf("%v without -json: exit %d: %q, %q; want %d", args, code, stdout, stderr, want)
				}
			}

			var s query.Status
			ask(exitUnsure, &s, "status")
			if s.Kernel == nil || s.Kernel.Release != labels["release"] || s.Panic == nil || s.Panic.Panicked || s.Uptime <= 0 {
				t.Errorf("status = %+v; want release %s, no panic, and an uptime", s, labels["release"])
			}

			var a query.Attach
			ask(exitOK, &a, "attach")
			if a.Kernel == nil || a.Kernel.Release != labels["release"] || len(a.Rungs) < 8 || a.Rungs[0].Name != "note" || !a.Rungs[0].OK {
				t.Errorf("attach = %+v; want the rungs to release %s", a, labels["release"])
			}

			var ps query.Processes
			ask(exitOK, &ps, "ps", "-threads")
			names := make(map[int]string)
			for _, p := range ps.Processes {
				names[p.TID] = p.Comm
			}
			processes := make(map[int]bool)
			for _, want := range threads {
				processes[want.TGID] = true
				// The host's own name for a kernel worker has its present work behind it.
				if got, ok := names[want.PID]; !ok || !strings.HasPrefix(want.Comm, got) {
					t.Errorf("ps -threads: thread %d is %q; the host says %q", want.PID, got, want.Comm)
				}
			}
			var whole query.Processes
			ask(exitOK, &whole, "ps")
			got := make(map[int]bool)
			for _, p := range whole.Processes {
				got[p.PID] = true
			}
			for _, pid := range slices.Sorted(maps.Keys(processes)) {
				if !got[pid] {
					t.Errorf("ps: process %d is missing", pid)
				}
			}

			var l query.Log
			ask(exitOK, &l, "dmesg")
			if len(l.Records) < len(records) {
				t.Fatalf("dmesg: %d records; the host has %d", len(l.Records), len(records))
			}
			// /dev/kmsg, where the host read them, writes control characters so.
			kmsg := strings.NewReplacer("\t", `\x09`, "\n", `\x0a`, `\`, `\x5c`)
			for i, want := range records {
				if got := kmsg.Replace(l.Records[i].Text); got != want.Text {
					t.Errorf("dmesg: record %d is %q; the host says %q", i, got, want.Text)
				}
			}

			older := !slices.Contains([]string{"6.1.hostmem", "6.12.hostmem"}, filepath.Base(path))
			for _, q := range query.Listings() {
				answer := q.Empty()
				if older && !slices.Contains(strings.Fields("lsmod ip pstree lsof mount ss slabtop vmstat load stack sym print"), q.Name) {
					continue // what these read is only in the recordings of 6.1 and 6.12
				}
				switch q.Name {
				case "routes6", "uprobes", "lsm":
					continue // the recordings are older, and do not hold what it reads
				case "sym":
					ask(exitOK, answer, "sym", "init_task")
				case "stack":
					ask(exitOK, answer, "stack", strconv.Itoa(asleep(t, whole)))
				case "proc", "maps":
					ask(exitOK, answer, q.Name, "1")
				case "environ":
					ask(exitOK, answer, q.Name, "1", "-secrets")
					if a := answer.(*query.Environment); len(a.Arguments) == 0 || a.Arguments[0] != "/init" {
						t.Errorf("environ 1 = %+v; want /init", a)
					}
					if code, out, stderr := command(t, "-image", path, "environ", "1"); code != exitUsage || out != "" || !strings.Contains(stderr, "-secrets") {
						t.Errorf("environ 1: exit %d, %q, %q; want it refused", code, out, stderr)
					}
				case "mem":
					var maps query.Mappings
					ask(exitOK, &maps, "maps", "1")
					i := slices.IndexFunc(maps.Mappings, func(m kernel.Mapping) bool { return m.Name == "[stack]" })
					ask(exitOK, answer, "mem", "1", fmt.Sprint(maps.Mappings[i].End-16), "16", "-secrets")
				case "x":
					ask(exitOK, answer, "x/s", "linux_banner", "-secrets")
					if a := answer.(*query.Examined); len(a.Values) != 1 || !strings.HasPrefix(a.Values[0].Text, `"Linux version `) {
						t.Errorf("x/s linux_banner = %+v", a)
					}
					ask(exitOK, answer, "-secrets", "x", "4xw", "linux_banner")
					if a := answer.(*query.Examined); len(a.Values) != 4 || a.Values[0].Text != "0x756e694c" || a.Values[3].Addr != a.Addr+12 {
						t.Errorf("x/4xw linux_banner = %+v", a)
					}
					for _, wrong := range []string{"x/8q", "x/0xb", "x/9999999g"} {
						if code, _, stderr := command(t, "-image", path, wrong, "init_task", "-secrets"); code != exitUsage || !strings.Contains(stderr, "8xg") {
							t.Errorf("%s: exit %d, %q", wrong, code, stderr)
						}
					}
				case "modinfo", "protections", "lspci":
					continue // what they show was not recorded; live guests' own words are compared with it
				case "print":
					if code, _, stderr := command(t, "-image", path, "print", "list_head", "init_task"); code != exitUsage || !strings.Contains(stderr, "-secrets") {
						t.Errorf("print without -secrets: exit %d, %q", code, stderr)
					}
					ask(exitOK, answer, "print", "list_head", "init_task", "-secrets")
				default:
					ask(exitOK, answer, q.Name)
				}
				if !answer.Whole().Complete {
					t.Errorf("%s = %+v; want it complete", q.Name, answer.Whole())
				}
			}
			if code, _, stderr := command(t, "-image", path, "lsof", "nobody"); code != exitUsage || !strings.Contains(stderr, "process ID") {
				t.Errorf("lsof nobody: exit %d, %q; want %d", code, stderr, exitUsage)
			}

			var load query.Load
			ask(exitOK, &load, "top", "-n", "3")
			if !load.SinceBoot || len(load.Processes) != 3 {
				t.Errorf("top -n 3 = %d processes, since boot %v; want 3 and true", len(load.Processes), load.SinceBoot)
			}
		})
	}
}

// asleep returns a process whose stack is in the recordings: they have those of every seventh.
func asleep(t *testing.T, ps query.Processes) int {
	t.Helper()
	for _, p := range ps.Processes {
		if p.PID%7 == 1 && !p.OnCPU && p.State != "Z" {
			return p.PID
		}
	}
	t.Fatal("no process of the recording sleeps")
	return 0
}
