package access

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func key(seed byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, ed25519.SeedSize))
}

func pub(k ed25519.PrivateKey) Key { return Key(k.Public().(ed25519.PublicKey)) }

const uuid = "6f1e5c1e-0001-4a6b-9d7a-0123456789ab"

func sample() *Agreement {
	return &Agreement{
		Version: 1, ID: "lab-1", Host: Host{UUID: uuid, Name: "host"},
		Owner:    Party{"owner", pub(key(1))},
		Monitors: []Party{{"monitor", pub(key(2))}},
		Rights:   Rights{Read: true, Write: true, Actions: []string{"kill-process"}},
		Protected: []Protected{
			{FirstUID: 0, LastUID: 0, Comm: "sshd"},
			{FirstUID: 500, LastUID: 599},
		},
		ValidFrom:  time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
		ValidUntil: time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC),
	}
}

func signed(t *testing.T) *Agreement {
	t.Helper()
	a := sample()
	for _, k := range []ed25519.PrivateKey{key(1), key(2)} {
		if err := a.Sign(k); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

func document(t *testing.T, a *Agreement) []byte {
	t.Helper()
	b, err := json.MarshalIndent(a, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestLoad(t *testing.T) {
	a := signed(t)
	got, err := Load(bytes.NewReader(document(t, a)), key(1).Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(a, got); diff != "" {
		t.Error(diff)
	}
}

// The canonical bytes of version 1. Do not change this test: agreements that were signed over them are in the field.
func TestCanonicalV1(t *testing.T) {
	b, err := sample().Canonical()
	if err != nil {
		t.Fatal(err)
	}
	const want = "backdoor access agreement v1\n" +
		`{"version":1,"id":"lab-1","host":{"uuid":"6f1e5c1e-0001-4a6b-9d7a-0123456789ab","name":"host"},` +
		`"owner":{"name":"owner","key":"iojj3XQJ8ZX9UtstPLpdcspnCb8dlBIb83SIAbQPb1w="},` +
		`"monitors":[{"name":"monitor","key":"gTl3Dqh9F19Wo1Rmw0x+zMuNipG07jeiXfYPW4/Js5Q="}],` +
		`"rights":{"read":true,"write":true,"actions":["kill-process"],"power":false},` +
		`"protected":[{"firstUID":0,"lastUID":0,"comm":"sshd"},{"firstUID":500,"lastUID":599}],` +
		`"validFrom":"2026-01-01T00:00:00Z","validUntil":"2027-01-01T00:00:00Z","signatures":null}`
	if diff := cmp.Diff(want, string(b)); diff != "" {
		t.Error(diff)
	}
}

func TestLoadRefuses(t *testing.T) {
	doc := string(document(t, signed(t)))
	owner := key(1).Public().(ed25519.PublicKey)
	// A second entry, so that what is said of it is said of it.
	memory := func(entry string) string {
		return strings.Replace(doc, `"power": false`, `"power": false, "memory": [{"start": 0, "size": 4096}, {`+entry+`}]`, 1)
	}
	half := sample()
	if err := half.Sign(key(1)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, doc string
		is        error
		want      string
	}{
		{"nothing", "", ErrInvalid, "EOF"},
		{"an unknown field", strings.Replace(doc, `"id"`, `"colour": 1, "id"`, 1), ErrInvalid, `unknown field "colour"`},
		{"a field twice", strings.Replace(doc, `"id"`, `"ID": "x", "id"`, 1), ErrInvalid, "id is there twice"},
		{"a nested field twice", strings.Replace(doc, `"write": true`, `"write": true, "write": true`, 1), ErrInvalid, "rights.write is there twice"},
		{"more behind it", doc + "{}", ErrInvalid, "something follows"},
		{"another version", strings.Replace(doc, `"version": 1`, `"version": 2`, 1), ErrInvalid, "this agent reads version 1"},
		{"an empty list of memory", strings.Replace(doc, `"power": false`, `"power": false, "memory": []`, 1), ErrInvalid, "is signed like none"},
		{"memory without end", strings.Replace(doc, `"power": false`, `"power": false, "memory": [{"start": 16, "size": 18446744073709551615}]`, 1), ErrInvalid, "are no range"},
		{"memory without a form", memory(`"read": true`), ErrInvalid, "rights.memory[1]: 0x0 bytes at 0x0 are no range; write start and size, or one of"},
		{"two names", memory(`"all": true, "kernelText": true`), ErrInvalid, "rights.memory[1]: has several of"},
		{"a name and a start", memory(`"symbol": "jiffies", "start": 4096`), ErrInvalid, "rights.memory[1]: has a start besides a name"},
		{"a name and a range", memory(`"all": true, "start": 4096, "size": 8`), ErrInvalid, "rights.memory[1]: has a start besides a name"},
		{"all and a size", memory(`"all": true, "size": 8`), ErrInvalid, "rights.memory[1]: has a size"},
		{"no symbol", memory(`"symbol": "", "read": true`), ErrInvalid, "are no range"},
		{"no name of a symbol", memory(`"symbol": "a b"`), ErrInvalid, `symbol "a b" must be`},
		{"a vast symbol", memory(`"symbol": "jiffies", "size": 18446744073709551615`), ErrInvalid, "no symbol has more than"},
		{"a process without a user", memory(`"process": {"comm": "worker"}`), ErrInvalid, "process has no uid"},
		{"a process without a name", memory(`"process": {"uid": 1000}`), ErrInvalid, "process.comm"},
		{"a process with a long name", memory(`"process": {"uid": 1000, "comm": "a-worker-of-mine"}`), ErrInvalid, "process.comm"},
		{"a process with more", memory(`"process": {"uid": 1000, "comm": "worker", "pid": 7}`), ErrInvalid, `unknown field "pid"`},
		{"a protected process", memory(`"process": {"uid": 550, "comm": "worker"}`), ErrInvalid, "rights.memory[1]: names processes that protected[1] protects"},
		{"an empty list of detectors", strings.Replace(doc, `"power": false`, `"power": false, "detectors": []`, 1), ErrInvalid, "rights.detectors: is empty"},
		{"no detector", strings.Replace(doc, `"power": false`, `"power": false, "detectors": ["panic", "*"]`, 1), ErrInvalid, "rights.detectors[1]"},
		{"a detector twice", strings.Replace(doc, `"power": false`, `"power": false, "detectors": ["policy/x", "policy/x"]`, 1), ErrInvalid, "rights.detectors[1]"},
		{"detectors added", strings.Replace(doc, `"power": false`, `"power": false, "detectors": ["policy/x", "panic"]`, 1), ErrUnsigned, "was changed after signing"},
		{"an empty list of rates", strings.Replace(doc, `"power": false`, `"power": false, "rates": []`, 1), ErrInvalid, "rights.rates: is empty"},
		{"a rate of nothing given", strings.Replace(doc, `"power": false`, `"power": false, "rates": [{"action": "power-cycle", "most": 1, "within": 60}]`, 1), ErrInvalid, "rights.rates[0].action"},
		{"a rate twice", strings.Replace(doc, `"power": false`, `"power": false, "rates": [{"action": "kill-process", "most": 1, "within": 60}, {"action": "kill-process", "most": 2, "within": 60}]`, 1), ErrInvalid, "rights.rates[1].action"},
		{"never", strings.Replace(doc, `"power": false`, `"power": false, "rates": [{"action": "kill-process", "most": 0, "within": 60}]`, 1), ErrInvalid, "rights.rates[0].most"},
		{"at no time", strings.Replace(doc, `"power": false`, `"power": false, "rates": [{"action": "kill-process", "most": 1, "within": 604801}]`, 1), ErrInvalid, "rights.rates[0].within"},
		{"an empty list of values", strings.Replace(doc, `"power": false`, `"power": false, "values": []`, 1), ErrInvalid, "rights.values: is empty"},
		{"a value of nothing given", strings.Replace(doc, `"power": false`, `"power": false, "values": [{"action": "set-sysctl", "name": "kernel.panic", "min": 1, "max": 2}]`, 1), ErrInvalid, "rights.values[0].action"},
		{"a value the wrong way round", strings.Replace(doc, `"power": false`, `"power": false, "values": [{"action": "kill-process", "name": "kernel.panic", "min": 2, "max": 1}]`, 1), ErrInvalid, "rights.values[0]: 2 to 1"},
		{"a value twice", strings.Replace(doc, `"power": false`, `"power": false, "values": [{"action": "kill-process", "name": "a", "min": 1, "max": 1}, {"action": "kill-process", "name": "a", "min": 2, "max": 2}]`, 1), ErrInvalid, "rights.values[1].name"},
		{"a value by a pattern", strings.Replace(doc, `"power": false`, `"power": false, "values": [{"action": "kill-process", "name": "kernel.*", "min": 1, "max": 1}]`, 1), ErrInvalid, "rights.values[0].name"},
		{"a value that is text", strings.Replace(doc, `"power": false`, `"power": false, "values": [{"action": "kill-process", "name": "a", "min": "1", "max": 1}]`, 1), ErrInvalid, "cannot unmarshal"},
		{"a value added", strings.Replace(doc, `"power": false`, `"power": false, "values": [{"action": "kill-process", "name": "a", "min": 1, "max": 1}]`, 1), ErrUnsigned, "was changed after signing"},
		{"all as a word", memory(`"all": "true"`), ErrInvalid, "cannot unmarshal"},
		{"a good name, unsigned", memory(`"process": {"uid": 0, "comm": "worker"}`), ErrUnsigned, "was changed after signing"},
		{"more memory", strings.Replace(doc, `"power": false`, `"power": false, "memory": [{"start": 0, "size": 4096, "write": true}]`, 1), ErrUnsigned, "was changed after signing"},
		{"more rights", strings.Replace(doc, `"power": false`, `"power": true`, 1), ErrUnsigned, "was changed after signing"},
		{"another host", strings.Replace(doc, "6f1e5c1e", "7f1e5c1e", 1), ErrUnsigned, "was changed after signing"},
		{"no host", strings.Replace(doc, uuid, "00000000-0000-0000-0000-000000000000", 1), ErrInvalid, "names no host"},
		{"a wildcard", strings.Replace(doc, `"kill-process"`, `"*"`, 1), ErrInvalid, "no wildcard"},
		{"protection removed", strings.Replace(doc, `"firstUID": 500`, `"firstUID": 599`, 1), ErrUnsigned, "was changed after signing"},
		{"the monitor's signature missing", string(document(t, half)), ErrUnsigned, `lacks the signature of monitor "monitor"`},
		{"no signatures", string(document(t, sample())), ErrUnsigned, `lacks the signature of owner "owner"`},
		{"too long", doc + strings.Repeat(" ", maxDocument), ErrInvalid, "longer than"},
		{"deep", strings.Repeat("[", 100), ErrInvalid, "nested too deeply"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, err := Load(strings.NewReader(tt.doc), owner)
			if a != nil || !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Load = %v, %v; want an error with %q", a, err, tt.want)
			}
		})
	}
	if _, err := Load(strings.NewReader(doc), key(3).Public().(ed25519.PublicKey)); !errors.Is(err, ErrUnsigned) {
		t.Errorf("Load with another owner = %v; want ErrUnsigned", err)
	}
	if err := sample().Sign(key(9)); err == nil {
		t.Error("Sign with a stranger's key succeeded")
	}
}

func TestGrant(t *testing.T) {
	a := signed(t)
	at := func(s string) func() time.Time {
		v, err := time.Parse(time.RFC3339, s)
		if err != nil {
			t.Fatal(err)
		}
		return func() time.Time { return v }
	}
	in := at("2026-06-01T00:00:00Z")
	for _, tt := range []struct {
		name  string
		g     Grant
		what  string
		want  string // "" = permitted
		other bool
	}{
		{"write", a.Grant(uuid, in), Write, "", false},
		{"in capitals", a.Grant(strings.ToUpper(uuid), in), Write, "", false},
		{"action", a.Grant(uuid, in), "kill-process", "", false},
		{"another action", a.Grant(uuid, in), "power-cycle", `does not give "power-cycle"`, false},
		{"power", a.Grant(uuid, in), Power, `does not give "power"`, false},
		{"nothing asked", a.Grant(uuid, in), "", "does not give", false},
		{"zero grant", Grant{}, Read, "no access agreement", false},
		{"no agreement", (*Agreement)(nil).Grant(uuid, in), Read, "no access agreement", false},
		{"another host", a.Grant("7f1e5c1e-0001-4a6b-9d7a-0123456789ab", in), Read, "this host is 7f1e", false},
		{"unknown host", a.Grant("", in), Read, "is not known", false},
		{"too early", a.Grant(uuid, at("2025-12-31T23:59:59Z")), Read, "valid only from", false},
		{"too late", a.Grant(uuid, at("2027-01-01T00:00:00Z")), Read, "ended at", false},
	} {
		err := tt.g.Permit(tt.what)
		if tt.want == "" {
			if err != nil {
				t.Errorf("%s: Permit(%q) = %v; want nil", tt.name, tt.what, err)
			}
			continue
		}
		if !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: Permit(%q) = %v; want %q", tt.name, tt.what, err, tt.want)
		}
	}
	g := a.Grant(uuid, in)
	for _, tt := range []struct {
		tgid    int
		kthread bool
		uid     uint32
		comm    string
		ok      bool
	}{
		{412, false, 1000, "spin", true},
		{412, false, 1000, "sshd", true}, // a user cannot protect himself by a name
		{412, false, 0, "sshd", false},
		{412, false, 0, "spin", true},
		{412, false, 550, "anything", false},
		{1, false, 0, "init", false},
		{0, false, 0, "swapper/0", false},
		{-5, false, 1000, "x", false},
		{17, true, 0, "kworker/0:1", false},
	} {
		err := g.PermitTask(tt.tgid, tt.kthread, tt.uid, tt.comm)
		if (err == nil) != tt.ok || err != nil && !errors.Is(err, ErrDenied) {
			t.Errorf("PermitTask(%d, %v, %d, %q) = %v; want permitted %v", tt.tgid, tt.kthread, tt.uid, tt.comm, err, tt.ok)
		}
	}
	if (Grant{}).PermitTask(412, false, 1000, "x") == nil {
		t.Error("the zero grant permits a task")
	}
}

func TestPermitMemory(t *testing.T) {
	in := func() time.Time { return time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC) }
	const top = ^uint64(0)
	whole := sample()
	ranges := sample()
	ranges.Rights.Memory = []Memory{{Start: 0x1000, Size: 0x1000, Read: true}, {Start: 0x4000, Size: 16, Read: true, Write: true}, {Start: 0x5000, Size: 8, Atomic: true}, {Start: top - 7, Size: 8, Read: true}}
	watch := sample()
	watch.Rights.Write, watch.Rights.Memory = false, ranges.Rights.Memory
	blind := sample()
	blind.Rights.Read = false
	for _, tt := range []struct {
		name                string
		a                   *Agreement
		start, size         uint64
		read, write, atomic bool
		ok                  bool
	}{
		{"all RAM", whole, 0, top, true, false, false, true},
		{"a store without ranges", whole, 0, 8, false, true, false, false},
		{"a swap without ranges", whole, 0, 8, false, false, true, false},
		{"within a range", ranges, 0x1ff8, 8, true, false, false, true},
		{"across its end", ranges, 0x1ff8, 9, true, false, false, false},
		{"before it", ranges, 0xfff, 8, true, false, false, false},
		{"a store into a range to read", ranges, 0x1000, 8, true, true, false, false},
		{"a store", ranges, 0x4008, 8, true, true, false, true},
		{"a swap where stores are given", ranges, 0x4008, 8, false, false, true, false},
		{"a swap", ranges, 0x5000, 8, false, false, true, true},
		{"a range that overflows", ranges, 0x4000, top, true, false, false, false},
		{"the end of the address space", ranges, top - 7, 8, true, false, false, true},
		{"a store without the right to write", watch, 0x4000, 8, false, true, false, false},
		{"without the right to read", blind, 0, 8, true, false, false, false},
	} {
		err := tt.a.Grant(uuid, in).PermitMemory(tt.start, tt.size, tt.read, tt.write, tt.atomic)
		if (err == nil) != tt.ok || err != nil && !errors.Is(err, ErrDenied) {
			t.Errorf("%s: %v; want permitted %v", tt.name, err, tt.ok)
		}
	}
	two := sample()
	two.Rights.TwoPersons, two.Rights.Memory = true, ranges.Rights.Memory
	g := two.Grant(uuid, in)
	if err := g.PermitMemory(0x1000, 8, true, false, false); err != nil {
		t.Errorf("one person reads: %v", err)
	}
	for _, w := range []struct {
		start         uint64
		write, atomic bool
	}{{0x4000, true, false}, {0x5000, false, true}} {
		if err := g.PermitMemory(w.start, 8, false, w.write, w.atomic); !errors.Is(err, ErrDenied) {
			t.Errorf("one person stores at %#x where it takes two: %v", w.start, err)
		}
		if err := g.PermitMemoryByTwo(w.start, 8, false, w.write, w.atomic); err != nil {
			t.Errorf("two persons store at %#x: %v", w.start, err)
		}
	}
	if err := g.PermitMemoryByTwo(0x1000, 8, true, true, false); !errors.Is(err, ErrDenied) {
		t.Errorf("two persons store where nobody may: %v", err)
	}
	if (Grant{}).PermitMemory(0, 8, true, false, false) == nil {
		t.Error("the zero grant permits reading")
	}
}

// named is an agreement with each form of memory.
func named() *Agreement {
	a := sample()
	uid := uint32(1000)
	a.Rights.Memory = []Memory{
		{Start: 0, Size: 0x1000, Read: true}, {All: true, Read: true}, {KernelText: true, Read: true}, {Symbol: "jiffies", Read: true, Write: true},
		{Symbol: "init_task", Size: 64, Atomic: true}, {Process: &Process{UID: &uid, Comm: "worker"}, Read: true, Write: true},
	}
	return a
}

// The canonical bytes of entries of rights.memory. Do not change this test: agreements that were signed over them are in the field.
func TestNamedMemory(t *testing.T) {
	a := named()
	for _, k := range []ed25519.PrivateKey{key(1), key(2)} {
		if err := a.Sign(k); err != nil {
			t.Fatal(err)
		}
	}
	b, err := a.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	const want = `"memory":[{"start":0,"size":4096,"read":true},{"read":true,"all":true},{"read":true,"kernelText":true},` +
		`{"read":true,"write":true,"symbol":"jiffies"},{"size":64,"atomic":true,"symbol":"init_task"},` +
		`{"read":true,"write":true,"process":{"uid":1000,"comm":"worker"}}]`
	if !strings.Contains(string(b), want) {
		t.Errorf("canonical form %s; want it to hold %s", b, want)
	}
	got, err := Load(bytes.NewReader(document(t, a)), key(1).Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(a, got); diff != "" {
		t.Error(diff)
	}
	var text strings.Builder
	if err := a.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"0x0 to 0xfff: read yes, write no, atomic no", "all RAM: read yes,", "the kernel's text: read yes,", `symbol "jiffies": read yes, write yes,`,
		`0x40 bytes of symbol "init_task": read no, write no, atomic yes`, `processes of user 1000 named "worker": read yes, write yes, atomic no`,
	} {
		if !strings.Contains(text.String(), "memory      "+line) {
			t.Errorf("text lacks %q:\n%s", line, text.String())
		}
	}
}

// places is a Resolver by a table: where what is named is now.
type places struct {
	at    map[string][2]uint64 // start and size, by Memory.Names
	asked []string
}

func (p *places) Inside(m Memory, start, size uint64, write bool, permit func(int, bool, uint32, string) error) error {
	name := m.Names()
	p.asked = append(p.asked, fmt.Sprint(name, " ", write))
	at, ok := p.at[name]
	if !ok {
		return errors.New("nobody knows")
	}
	if m.Process != nil && permit(7, false, *m.Process.UID, m.Process.Comm) != nil {
		return errors.New("it is protected")
	}
	if start < at[0] || start+size > at[0]+at[1] {
		return errors.New("it is elsewhere")
	}
	return nil
}

func TestPermitNamedMemory(t *testing.T) {
	in := func() time.Time { return time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC) }
	a := named()
	a.Rights.Memory = a.Rights.Memory[2:] // neither a range nor all
	p := &places{at: map[string][2]uint64{"the kernel's text": {0x100000, 0x1000}, `symbol "jiffies"`: {0x200000, 8}, `0x40 bytes of symbol "init_task"`: {0x300000, 64},
		`processes of user 1000 named "worker"`: {0x400000, 0x2000}}}
	g := a.Grant(uuid, in).Resolving(p)
	if !g.Named() || sample().Grant(uuid, in).Named() || (Grant{}).Named() {
		t.Error("Named does not tell which grants have names")
	}
	check := func(g Grant, start, size uint64, read, write, atomic bool, want string) {
		t.Helper()
		err := g.PermitMemory(start, size, read, write, atomic)
		if want == "" && err != nil {
			t.Errorf("%#x bytes at %#x: %v; want them permitted", size, start, err)
		}
		if want != "" && (!errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), want)) {
			t.Errorf("%#x bytes at %#x: %v; want it denied with %q", size, start, err, want)
		}
	}
	check(g, 0x100000, 0x1000, true, false, false, "")
	check(g, 0x100001, 0x1000, true, false, false, "the kernel's text: it is elsewhere")
	check(g, 0x100000, 8, true, true, false, "elsewhere") // may be read only
	check(g, 0x200000, 8, true, true, false, "")
	check(g, 0x200000, 8, true, false, true, "not permitted")
	check(g, 0x300000, 64, false, false, true, "")
	check(g, 0x401ff8, 8, true, true, false, "")
	if p.asked = nil; g.PermitMemory(0x401ff8, 8, true, true, false) != nil || !slices.Contains(p.asked, `processes of user 1000 named "worker" true`) {
		t.Errorf("a store was asked about as %q", p.asked)
	}
	// Each use asks anew: what moves is given no longer where it was.
	p.at[`symbol "jiffies"`] = [2]uint64{0x500000, 8}
	check(g, 0x200000, 8, true, true, false, `symbol "jiffies": it is elsewhere`)
	check(g, 0x500000, 8, true, true, false, "")
	delete(p.at, "the kernel's text")
	check(g, 0x100000, 8, true, false, false, "the kernel's text: nobody knows")

	check(a.Grant(uuid, in), 0x200000, 8, true, false, false, "no kernel of the host is attached")
	check(g.Resolving(nil), 0x200000, 8, true, false, false, "no kernel of the host is attached")
	watch := named()
	watch.Rights.Write, watch.Rights.Memory = false, a.Rights.Memory
	check(watch.Grant(uuid, in).Resolving(p), 0x500000, 8, true, true, false, `does not give "write"`)
	// A range is given whatever the names say.
	check(named().Grant(uuid, in), 0, 8, true, false, false, "")
	// What takes two persons by a range takes two by a name.
	two := named()
	two.Rights.TwoPersons = true
	check(two.Grant(uuid, in).Resolving(p), 0x500000, 8, true, true, false, "takes two persons")
	if err := two.Grant(uuid, in).Resolving(p).PermitMemoryByTwo(0x500000, 8, true, true, false); err != nil {
		t.Errorf("two persons: %v", err)
	}
}

func FuzzLoad(f *testing.F) {
	a := sample()
	for _, k := range []ed25519.PrivateKey{key(1), key(2)} {
		if err := a.Sign(k); err != nil {
			f.Fatal(err)
		}
	}
	b, err := json.Marshal(a)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"version":1}`))
	for _, m := range []string{`"all":true`, `"kernelText":true`, `"symbol":"jiffies","size":8`, `"process":{"uid":1000,"comm":"worker"}`, `"all":true,"process":{}`} {
		f.Add(bytes.Replace(b, []byte(`"power":false`), []byte(`"power":false,"memory":[{"read":true,`+m+`}]`), 1))
	}
	owner := key(1).Public().(ed25519.PublicKey)
	want, err := a.Canonical()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		// What is read is written so that it reads the same.
		if p, err := Parse(bytes.NewReader(b)); err == nil {
			c, err := p.Canonical()
			if written, merr := json.Marshal(p); err == nil && merr == nil {
				again, err := Parse(bytes.NewReader(written))
				if err != nil {
					t.Fatalf("%s was written, and reads: %v", written, err)
				}
				if d, err := again.Canonical(); err != nil || !bytes.Equal(c, d) {
					t.Fatalf("%s was written of what is canonically %s", written, c)
				}
			}
		}
		a, err := Load(bytes.NewReader(b), owner)
		if (a == nil) == (err == nil) {
			t.Fatalf("Load = %v, %v; want a value or an error", a, err)
		}
		if err != nil {
			return
		}
		// Nobody but the holders of the keys can make a document that loads, so it says what they have signed.
		got, err := a.Canonical()
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("a document loads that was never signed: %s", got)
		}
	})
}

func TestPermitValue(t *testing.T) {
	now := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	in := func() time.Time { return now }
	a := sample()
	a.Rights.Actions = []string{"set-sysctl", "set-memory-max"}
	if err := a.Grant(uuid, in).PermitValue("set-sysctl", "kernel.panic", 7); err != nil {
		t.Errorf("what bounds nothing denies: %v", err)
	}
	a.Rights.Values = []ValueRange{{"set-sysctl", "kernel.panic", -1, 60}, {"set-sysctl", "kernel.pid_max", 40000, 40000}}
	for _, tt := range []struct {
		action, name string
		n            int64
		want         string
	}{
		{"set-sysctl", "kernel.panic", -1, ""}, {"set-sysctl", "kernel.panic", 60, ""}, {"set-sysctl", "kernel.pid_max", 40000, ""},
		{"set-sysctl", "kernel.panic", 61, `gives "set-sysctl" for kernel.panic -1 to 60, not 61; ask within that`},
		{"set-sysctl", "kernel.panic", -2, "not -2"},
		{"set-sysctl", "kernel.panic_on_oops", 1, `does not give "set-sysctl" for kernel.panic_on_oops`},
		{"set-memory-max", "memory.max", 1 << 40, ""},
		{"kill-process", "kernel.panic", 1, `does not give "kill-process"`},
	} {
		err := a.Grant(uuid, in).PermitValue(tt.action, tt.name, tt.n)
		if (err == nil) != (tt.want == "") || err != nil && (!errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("PermitValue(%q, %q, %d) = %v; want %q", tt.action, tt.name, tt.n, err, tt.want)
		}
	}
	for name, g := range map[string]Grant{"no agreement": {}, "another host": a.Grant("x", in), "ended": a.Grant(uuid, func() time.Time { return now.AddDate(10, 0, 0) })} {
		if err := g.PermitValue("set-sysctl", "kernel.panic", 1); !errors.Is(err, ErrDenied) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Without the list the canonical bytes are what they were before there was one.
	a.Rights.Values = nil
	if b, err := a.Canonical(); err != nil || bytes.Contains(b, []byte("values")) {
		t.Errorf("%s, %v", b, err)
	}
}

func TestPermitDetectorAndRate(t *testing.T) {
	now := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	in := func() time.Time { return now }
	a := sample()
	if g := a.Grant(uuid, in); g.PermitDetector("panic") != nil || g.PermitRate("kill-process", now, make([]time.Time, 100)) != nil || (Grant{}).PermitDetector("panic") != nil {
		t.Error("what bounds nothing is denied")
	}
	a.Rights.Detectors = []string{"panic", "policy/miner"}
	a.Rights.Rates = []Rate{{Action: "kill-process", Most: 2, Within: 60}}
	for _, at := range []time.Time{now, now.AddDate(10, 0, 0)} { // an agreement that has ended binds
		g := a.Grant(uuid, func() time.Time { return at })
		for id, want := range map[string]bool{"panic": true, "policy/miner": true, "miner": false, "oops": false, "": false} {
			if err := g.PermitDetector(id); (err == nil) != want || err != nil && !errors.Is(err, ErrDenied) {
				t.Errorf("PermitDetector(%q) = %v; want it permitted: %v", id, err, want)
			}
		}
	}
	ago := func(seconds ...int) (begun []time.Time) {
		for _, s := range seconds {
			begun = append(begun, now.Add(-time.Duration(s)*time.Second))
		}
		return begun
	}
	for _, tt := range []struct {
		action string
		begun  []time.Time
		want   string
	}{
		{"kill-process", nil, ""},
		{"kill-process", ago(10), ""},
		{"kill-process", ago(100, 60, 10), ""},
		{"kill-process", ago(59, 10), "2 times within 1m0s, and it was begun 2 times; wait until 2026-06-01T00:00:01Z"},
		{"kill-process", ago(-5, -3600), "was begun 2 times"}, // a clock that was set back
		{"power-cycle", ago(1, 1, 1), ""},
	} {
		err := a.Grant(uuid, in).PermitRate(tt.action, now, tt.begun)
		if (err == nil) != (tt.want == "") || err != nil && (!errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("PermitRate(%q, %v) = %v; want %q", tt.action, tt.begun, err, tt.want)
		}
	}
	if err := (Grant{}).PermitRate("kill-process", now, nil); !errors.Is(err, ErrDenied) {
		t.Errorf("without an agreement: %v", err)
	}
}
