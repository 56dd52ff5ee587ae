package main

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"testing"

	"github.com/backdoor-rhs/backdoor/agent/dump"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// fakeRAM is RAM from 1 MiB on in which each byte tells its address.
func fakeRAM(context.Context) (io.ReaderAt, []hostmem.Range, error) {
	return addressRAM{}, []hostmem.Range{{Start: 1 << 20, Size: 1 << 20}}, nil
}

// fakeCore is a core of that RAM.
func fakeCore(context.Context) (*dump.Core, error) {
	mem, ram, _ := fakeRAM(context.Background())
	return dump.New(dump.Source{
		Arch: "x86_64", Memory: mem, RAM: ram, VMCOREINFO: "OSRELEASE=6.1\nPAGESIZE=4096\n",
		Image: kernel.Span{Virt: 0xffffffff81000000, Phys: 0x110000, Size: 0x8000}, Direct: kernel.Span{Virt: 0xffff888000000000, Size: 1 << 30},
	})
}

type addressRAM struct{}

func (addressRAM) ReadAt(b []byte, off int64) (int, error) {
	for i := range b {
		b[i] = byte(off + int64(i))
	}
	return len(b), nil
}

const login = " -host $URL -fingerprint $PIN -user "

// admin changes the initial password and returns a function that runs a line as the administrator.
func (b *bench) admin(t *testing.T) func(line string) (int, string, string) {
	t.Helper()
	if code, _, errs := b.run("login"+login+"admin -password-file $DIR/initial -new-password-file $DIR/new", ""); code != 0 {
		t.Fatalf("login: %s", errs)
	}
	return func(line string) (int, string, string) {
		return b.run(line+login+"admin -password-file $DIR/new", "")
	}
}

func TestCollectAndMemory(t *testing.T) {
	b := newBench(t)
	do := b.admin(t)
	if code, _, errs := do("collect memory 0x100010 4096 -o $DIR/ram.bin"); code != 0 {
		t.Fatalf("collect memory: %s", errs)
	}
	want := make([]byte, 4096)
	if _, err := (addressRAM{}).ReadAt(want, 0x100010); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(b.path("ram.bin")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the file has %d bytes, %v", len(got), err)
	}
	// A download that broke off goes on, with what has come of this entry and of no other.
	_, list, _ := do("collect list -json")
	var entries []schema.LogEntry
	if err := json.Unmarshal([]byte(list), &entries); err != nil || len(entries) != 1 {
		t.Fatalf("collect list -json: %v: %s", err, list)
	}
	made := strings.NewReplacer("-", "", ":", "", "T", "", "Z", "", ".", "", "+", "").Replace(entries[0].Created)
	b.write("again.bin.1-"+made+".part", string(want[:1000]))
	b.write("again.bin.1-20200101000000.part", "of another entry 1")
	if code, out, errs := do("collect get 1 -o $DIR/again.bin"); code != 0 || !strings.Contains(out, "4096 bytes") {
		t.Fatalf("collect get: %s %s", out, errs)
	}
	if got, err := os.ReadFile(b.path("again.bin")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the resumed file has %d bytes, %v", len(got), err)
	}
	if code, out, _ := do("collect list"); code != 0 || !strings.Contains(out, "4096") {
		t.Errorf("collect list: %q", out)
	}
	if code, out, errs := do("collect recording memory-hog-1 -o $DIR/hog.json.gz"); code != 0 || !strings.Contains(out, "22 bytes") {
		t.Errorf("collect recording = %d: %s%s", code, out, errs)
	}
	if code, _, errs := do("collect recording memory-hog-2 -o $DIR/hog.json.gz"); code == 0 || !strings.Contains(errs, "no such recording is kept") {
		t.Errorf("collect recording of a finding that there is not = %d: %s", code, errs)
	}
	for _, line := range []string{"collect recording", "collect recording a b -o x", "collect dmesg", "collect list -o x", "collect memory 0x1 -o x", "collect memory here 1 -o x", "collect memory 0x100000 0 -o x", "collect get ../1 -o x", "collect vmcore", "collect vmcore now -o x"} {
		if code, _, _ := do(line); code != exitUsage {
			t.Errorf("%s = %d; want a usage error", line, code)
		}
	}

	// What was agreed to is carried out, and nothing else.
	b.agent.do(func() { b.agent.moved = true })
	if code, _, errs := b.run("heal runaway-process-2"+login+"admin -password-file $DIR/new", "y\n"); code == 0 || !strings.Contains(errs, "moved on") {
		t.Errorf("heal of a host that moves on = %d: %s", code, errs)
	}
	b.agent.do(func() { b.agent.moved = false })
	// A value is shown with the plan; what cannot be is refused with what can.
	if code, out, errs := do("heal runaway-process-2 -set kernel.panic=-1 -dry-run"); code != 0 || !strings.Contains(out, "value        kernel.panic=-1\n") {
		t.Errorf("heal -set = %d: %s%s", code, out, errs)
	}
	for set, want := range map[string]string{"kernel.panic=-7": "kernel.panic=-1..86400", "kernel.panic=x": "NAME=NUMBER", "kernel.modprobe=1": "kernel.modprobe"} {
		if code, _, errs := do("heal runaway-process-2 -dry-run -set " + set); code == 0 || !strings.Contains(errs, want) {
			t.Errorf("heal -set %s = %d: %s", set, code, errs)
		}
	}

	// Raw memory takes a privilege that the administrator has to give away first.
	if code, _, _ := do("memory read 0x100000 16"); code != exitDenied {
		t.Errorf("memory read by the administrator = %d; want %d", code, exitDenied)
	}
	for _, line := range []string{
		`redfish post /redfish/v1/AccountService/Roles {"RoleId":"Memory","AssignedPrivileges":["Login","ConfigureComponents","ConfigureSelf"],"OemPrivileges":["BackdoorMemory"]}`,
		`redfish post /redfish/v1/AccountService/Accounts {"UserName":"memory","Password":"correct-horse-battery","RoleId":"Memory"}`,
	} {
		if code, _, errs := do(line); code != 0 {
			t.Fatalf("%s: %s", line, errs)
		}
	}
	b.write("memory", "correct-horse-battery\n")
	mem := func(line string) (int, string, string) {
		return b.run(line+login+"memory -password-file $DIR/memory", "")
	}
	if code, _, errs := do("collect vmcore -o $DIR/core"); code != exitDenied || !strings.Contains(errs, "BackdoorMemory") {
		t.Errorf("collect vmcore by the administrator = %d: %s; want %d", code, errs, exitDenied)
	}
	if code, out, errs := mem("collect vmcore -o $DIR/core"); code != 0 {
		t.Errorf("collect vmcore = %d: %s%s", code, out, errs)
	}
	core, err := elf.Open(b.path("core"))
	if err != nil {
		t.Fatal(err)
	}
	defer core.Close()
	ram := core.Progs[len(core.Progs)-1]
	first := make([]byte, 16)
	if _, err := ram.ReadAt(first, 0x41); err != nil || string(first) != "ABCDEFGHIJKLMNOP" || ram.Paddr != 1<<20 || ram.Filesz != 1<<20 {
		t.Errorf("the core's last segment = %+v, with %q at 0x41, %v", ram.ProgHeader, first, err)
	}
	code, out, errs := mem("memory read 0x100041 17")
	if want := "0000000000100041  41 42 43 44 45 46 47 48 49 4a 4b 4c 4d 4e 4f 50  |ABCDEFGHIJKLMNOP|\n0000000000100051  51                                               |Q|\n"; code != 0 || out != want {
		t.Errorf("memory read = %d\n%s%s; want\n%s", code, out, errs, want)
	}
	if code, out, errs := mem("memory write 0x100041 4142 0000 -y"); code != 0 || !strings.Contains(out, "Stored 2 bytes at 0x100041") || len(b.agent.stores) != 1 {
		t.Errorf("memory write: %s%s; %d stores", out, errs, len(b.agent.stores))
	}
	if s := b.agent.stores[0]; s.Caller != "memory" || string(s.Expect) != "AB" || string(s.Put) != "\x00\x00" {
		t.Errorf("the engine was asked for %+v", s)
	}
	if code, out, _ := b.run("memory write 0x100041 41 00"+login+"memory -password-file $DIR/memory", "n\n"); code == 0 || len(b.agent.stores) != 1 {
		t.Errorf("a write that was not confirmed: %d %s; %d stores", code, out, len(b.agent.stores))
	}
	if code, out, _ := mem("memory leases"); code != 0 || !strings.Contains(out, "Nobody") {
		t.Errorf("leases are left: %s", out)
	}
	// Two persons: the store waits for another account's word. One's own is none.
	if code, _, errs := do(`redfish post /redfish/v1/AccountService/Accounts {"UserName":"second","Password":"correct-horse-battery","RoleId":"Memory"}`); code != 0 {
		t.Fatal(errs)
	}
	written := make(chan string, 1)
	go func() {
		code, out, errs := mem("memory write 0x100041 4344 0000 -y -two-persons")
		written <- fmt.Sprintf("%d %s%s", code, out, errs)
	}()
	var held []struct {
		Lease struct {
			ID string `json:"@odata.id"`
		}
	}
	for len(held) == 0 {
		if code, out, errs := mem("memory leases -json"); code != 0 || json.Unmarshal([]byte(out), &held) != nil {
			t.Fatalf("memory leases: %s%s", out, errs)
		}
	}
	id := path.Base(held[0].Lease.ID)
	if code, _, _ := mem("memory cosign " + id); code != exitDenied {
		t.Errorf("memory cosign of one's own lease = %d; want %d", code, exitDenied)
	}
	if code, out, errs := b.run("memory cosign "+id+login+"second -password-file $DIR/memory", ""); code != 0 {
		t.Fatalf("memory cosign: %s%s", out, errs)
	}
	if got := <-written; !strings.HasPrefix(got, "0 Stored 2 bytes") || !strings.Contains(got, "Cosigned by second") {
		t.Errorf("memory write -two-persons: %s", got)
	}
	if s := b.agent.stores[len(b.agent.stores)-1]; s.Second != "second" || s.Caller != "memory" {
		t.Errorf("the engine was asked for %+v", s)
	}
	for _, line := range []string{"memory cosign", "memory read 0x100000", "memory write 0x100000 41 4142 -y", "memory write 0x100000 4g 41 -y", "memory write 0x100000 . . -y"} {
		if code, _, _ := mem(line); code != exitUsage {
			t.Errorf("%s = %d; want a usage error", line, code)
		}
	}
}

func TestEventsAndMetrics(t *testing.T) {
	b := newBench(t)
	do := b.admin(t)
	code, out, errs := do("events -json")
	if code != 0 || !strings.Contains(out, "ResourceChanged") {
		t.Fatalf("events = %d\n%s%s", code, out, errs)
	}
	for line := range strings.Lines(out) {
		if !json.Valid([]byte(line)) {
			t.Errorf("not a line of JSON: %s", line)
		}
	}
	if code, out, _ := do(`events -filter RegistryPrefix%20eq`); code == 0 {
		t.Errorf("a filter that cannot be read: %s", out)
	}
	// -f goes on with what comes.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	lines := make(lineWriter, 1000)
	ended := make(chan int)
	go func() {
		ended <- run(ctx, strings.Fields(os.Expand("events -f"+login+"admin -password-file $DIR/new", func(n string) string {
			return map[string]string{"URL": b.url, "PIN": b.pin, "DIR": b.dir}[n]
		})), strings.NewReader(""), lines, io.Discard)
	}()
	lines.until(t, "ResourceChanged")
	if code, _, errs := do(`redfish post /redfish/v1/EventService/Actions/EventService.SubmitTestEvent {"MessageId":"ResourceEvent.1.4.TestMessage"}`); code != 0 {
		t.Fatal(errs)
	}
	lines.until(t, "TestMessage")
	cancel()
	if code := <-ended; code != 0 {
		t.Errorf("events -f that was interrupted = %d", code)
	}
	if code, out, errs := do("metrics Agent"); code != 0 || !strings.Contains(out, "EnginePasses") || !strings.Contains(out, "42") {
		t.Errorf("metrics = %d\n%s%s", code, out, errs)
	}
	if code, _, _ := do("metrics Nothing"); code == 0 {
		t.Error("a report that is not there was shown")
	}
}

func TestTasksAndRedfish(t *testing.T) {
	b := newBench(t)
	do := b.admin(t)
	code, out, errs := do(`redfish post /redfish/v1/Systems/system/Actions/Oem/BackdoorComputerSystem.Heal {"Finding":"runaway-process-2","DryRun":true}`)
	if code != 0 || !strings.Contains(out, `"Completed"`) {
		t.Fatalf("redfish post = %d\n%s%s", code, out, errs)
	}
	if code, out, _ := do("tasks"); code != 0 || !strings.Contains(out, "Completed") {
		t.Errorf("tasks: %s", out)
	}
	if code, out, _ := do("tasks 1 -f"); code != 0 || !strings.Contains(out, "has 3 steps") {
		t.Errorf("tasks 1: %s", out)
	}
	if code, _, errs := do("tasks cancel 1"); code != 0 {
		t.Errorf("tasks cancel: %s", errs)
	}
	if code, _, _ := do("tasks 1"); code == 0 {
		t.Error("a task that was removed is shown")
	}
	if code, out, _ := do("redfish get /redfish/v1/Systems/system?%24select=Name"); code != 0 || !strings.Contains(out, `"Name": "system"`) || strings.Contains(out, "Status") {
		t.Errorf("redfish get: %s", out)
	}
	for _, line := range []string{"redfish get", "redfish put /x", "redfish patch /redfish/v1/", "redfish post /x {", "redfish delete /x {}", "tasks a b", "tasks ../x"} {
		if code, _, _ := do(line); code != exitUsage {
			t.Errorf("%s = %d; want a usage error", line, code)
		}
	}
}
