package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"flag"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/agent/heal"
	"github.com/backdoor-rhs/backdoor/agent/journal"
	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// command runs a command line without any agent.
func command(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), append([]string{"-config", filepath.Join(t.TempDir(), "contexts.json")}, args...), strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

func TestFindVerb(t *testing.T) {
	for _, tt := range []struct {
		args string
		want string
		at   int
	}{
		{"status", "status", 0},
		{"-json status", "status", 1},
		{"-host ps status", "status", 2},
		{"--host=ps status", "status", 1},
		{"-dry-run heal x", "heal", 1},
		{"-action kill-process heal x", "heal", 2},
		{"-n 5 top", "top", 2},
		{"-json", "", 0},
		{"-host", "", 0},
		{"", "", 0},
		{"-unknown status", "status", 1},
	} {
		if got, at := findVerb(strings.Fields(tt.args)); got != tt.want || at != tt.at {
			t.Errorf("findVerb(%q) = %q, %d; want %q, %d", tt.args, got, at, tt.want, tt.at)
		}
	}
}

func TestPermute(t *testing.T) {
	for _, tt := range []struct {
		args, want string
		a          bool
	}{
		{"x -a y", "x y", true},
		{"-a x y", "x y", true},
		{"x y", "x y", false},
		{"x -- -a y", "x -a y", false},
		{"-- -a", "-a", false},
		{"x -b val -a", "x", true},
		{"-b -- x -a", "x", true}, // "--" is the value of -b
	} {
		fs := flag.NewFlagSet("", flag.ContinueOnError)
		fs.SetOutput(io.Discard)
		a := fs.Bool("a", false, "")
		fs.String("b", "", "")
		got, err := permute(fs, strings.Fields(tt.args))
		if err != nil || strings.Join(got, " ") != tt.want || *a != tt.a {
			t.Errorf("permute(%q) = %q, %v, -a %v; want %q, -a %v", tt.args, got, err, *a, tt.want, tt.a)
		}
	}
}

// A flag takes a value for all verbs, or for none: findVerb relies on it.
func TestFlagsAgree(t *testing.T) {
	kind := make(map[string]bool)
	for _, v := range verbs() {
		fs := flag.NewFlagSet("", flag.ContinueOnError)
		new(options).global(fs)
		if v.flags != nil {
			v.flags(fs, new(options))
		}
		fs.VisitAll(func(f *flag.Flag) {
			isBool := !takesValue(f)
			if was, seen := kind[f.Name]; seen && was != isBool {
				t.Errorf("flag -%s takes a value for some verbs only", f.Name)
			}
			kind[f.Name] = isBool
		})
	}
}

// The package comment is the manual: every verb is in it.
func TestManualHasEveryVerb(t *testing.T) {
	doc, err := os.ReadFile("main.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range verbs() {
		if !strings.Contains(string(doc), "\n//\t"+v.name+" ") {
			t.Errorf("the manual in main.go does not have the verb %s", v.name)
		}
		code, out, _ := command(t, "help", v.name)
		if code != exitOK || !strings.Contains(out, "Usage: backdoor") || v.short == "" {
			t.Errorf("help %s: exit %d\n%s", v.name, code, out)
		}
		if c, again, _ := command(t, v.name, "-h"); !v.raw && (c != exitOK || again != out) {
			t.Errorf("%s -h: exit %d\n%s", v.name, c, again)
		}
	}
}

// Bad memory is "could not tell", never health and never a crash.
func TestBadMemory(t *testing.T) {
	dir := t.TempDir()
	random := make([]byte, 1<<20)
	rand.Read(random)
	elf := append([]byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x04\x00\x3e\x00"), make([]byte, 100)...)
	for name, data := range map[string][]byte{"empty": nil, "zeros": make([]byte, 1<<20), "random": random, "short": {1, 2, 3}, "elf": elf,
		"note": append(make([]byte, 1<<20), "VMCOREINFO\x00OSRELEASE=6.1.0\nPAGESIZE=4096\n"...)} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, how := range []string{"-image", "-mem"} {
			for _, verb := range []string{"status", "ps", "top", "dmesg"} {
				code, stdout, stderr := command(t, how, path, verb)
				want := code == exitUnsure || code == exitError
				if how == "-mem" && name == "elf" {
					want = code == exitUsage // it is told to say -image
				}
				if !want || stdout != "" || !strings.HasPrefix(stderr, "backdoor: ") {
					t.Errorf("%s %s %s: exit %d\n%s\n%s", how, name, verb, code, stdout, stderr)
				}
			}
		}
	}
	code, _, stderr := command(t, "-image", filepath.Join(dir, "random"), "ps")
	if code != exitUnsure || !strings.Contains(stderr, "find a kernel in") {
		t.Errorf("-image random ps: exit %d: %s; want %d", code, stderr, exitUnsure)
	}
}

func TestContextsFile(t *testing.T) {
	b := newBench(t)
	if code, _, stderr := b.run("login -host $URL -fingerprint $PIN -context dpu -password-file $DIR/initial -new-password-file $DIR/new -save-password", ""); code != exitOK {
		t.Fatalf("login: exit %d: %s", code, stderr)
	}
	st, err := os.Stat(b.path("contexts.json"))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("contexts.json: mode %v, %v; want 0600", st.Mode(), err)
	}
	for _, line := range []string{"config view", "config get-contexts", "config get-contexts -json"} {
		if _, out, _ := b.run(line, ""); strings.Contains(out, newPassword) {
			t.Errorf("%s shows the password:\n%s", line, out)
		}
	}
	// The session ends behind our back: the saved password opens another.
	c, err := readContexts(b.path("contexts.json"))
	if err != nil {
		t.Fatal(err)
	}
	c.Contexts[0].Token = strings.Repeat("0", len(c.Contexts[0].Token))
	if err := c.write(b.path("contexts.json")); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := b.run("power status", ""); code != exitOK {
		t.Errorf("power status with an ended session and a saved password: exit %d: %s", code, stderr)
	}
	c.Contexts[0].Password = ""
	if err := c.write(b.path("contexts.json")); err != nil {
		t.Fatal(err)
	}
	code, _, stderr := b.run("power status", "")
	if code != exitDenied || !strings.Contains(stderr, "log in again with: backdoor login -context dpu") {
		t.Errorf("power status with an ended session: exit %d: %s; want %d and the next step", code, stderr, exitDenied)
	}
	// Other ways to be let in, and to know the certificate.
	for _, line := range []string{
		"-host $URL -fingerprint $PIN -password-file $DIR/new power status",
		"-host $URL -insecure -password-file $DIR/new power status",
		"-host $URL -ca $DIR/ca.pem -password-file $DIR/new power status",
	} {
		if code, _, stderr := b.run(line, ""); code != exitOK {
			t.Errorf("%s: exit %d: %s", line, code, stderr)
		}
	}
}

func TestContextsErrors(t *testing.T) {
	for data, want := range map[string]string{
		``: `c:1:1: the document is empty`,
		`{"version": 1, "contexts": [{"name": "a", "url": "u", "passwrod": "x"}]}`:           `c:1:55: contexts[0].passwrod: unknown field, did you mean password?`,
		`{"version": 3, "contexts": []}`:                                                     `c: version: want 1, found 3`,
		`{"version": 1, "contexts": [{"name": "a"}]}`:                                        `c: contexts[0]: name and url are required`,
		`{"version": 1, "current": "b", "contexts": []}`:                                     `c: current: there is no context "b"`,
		`{"version": 1, "contexts": [{"name": "a", "url": "u"}, {"name": "a", "url": "v"}]}`: `c: contexts[1]: there are two contexts named "a"`,
	} {
		if _, err := parseContexts("c", []byte(data)); err == nil || err.Error() != want {
			t.Errorf("parseContexts(%s) = %v; want %s", data, err, want)
		}
	}
}

func FuzzParseContexts(f *testing.F) {
	f.Add([]byte(`{"version":1,"current":"a","contexts":[{"name":"a","url":"https://x","user":"u","sha256":"00","insecure":true}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parseContexts("c", data)
		if err != nil {
			return
		}
		b, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseContexts("c", b); c.Contexts != nil && err != nil {
			t.Fatalf("parseContexts(%s): %v", b, err)
		}
	})
}

// TestOrders pauses an agent's agreement, resumes it and replaces it, as its owner would.
func TestOrders(t *testing.T) {
	b := newBench(t)
	if code, _, stderr := b.run("login -host $URL -fingerprint $PIN -context dpu -password-file $DIR/initial -new-password-file $DIR/new -save-password", ""); code != exitOK {
		t.Fatalf("login: exit %d: %s", code, stderr)
	}
	keys := map[string]string{}
	do := func(args ...string) string {
		t.Helper()
		code, out, stderr := command(t, append([]string{"agreement"}, args...)...)
		if code != exitOK {
			t.Fatalf("%v: exit %d: %s", args, code, stderr)
		}
		return out
	}
	make := func(name string, args ...string) {
		t.Helper()
		b.write(name, do(args...))
	}
	for _, who := range []string{"owner", "ops", "next"} {
		make(who+".pub", "keygen", b.path(who))
		public, err := os.ReadFile(b.path(who + ".pub"))
		if err != nil {
			t.Fatal(err)
		}
		keys[who] = strings.TrimSpace(string(public))
	}
	parties := []string{"-uuid", "1b4e28ba-2fa1-11d2-883f-0016d3cca427", "-owner", "acme=" + keys["owner"], "-permit-read"}
	make("a.json", slices.Concat([]string{"new", "-monitor", "ops=" + keys["ops"]}, parties)...)
	do("sign", b.path("a.json"), "-key", b.path("owner"))
	do("sign", b.path("a.json"), "-key", b.path("ops"))
	var owner access.Key
	if err := owner.UnmarshalText([]byte(keys["owner"])); err != nil {
		t.Fatal(err)
	}
	lock, err := access.OpenLock(b.path("lock"), ed25519.PublicKey(owner), nil)
	if err != nil {
		t.Fatal(err)
	}
	send := func(name string, want int) {
		t.Helper()
		if code, out, stderr := b.run("agreement send $DIR/"+name, ""); code != want {
			t.Errorf("send %s: exit %d: %s%s; want %d", name, code, out, stderr, want)
		}
	}
	send("a.json", exitDenied) // nobody is trusted yet
	b.agent.do(func() { b.agent.lock = lock })
	send("a.json", exitOK)
	permitted := func(when string, want bool) {
		t.Helper()
		if err := lock.Grant("1b4e28ba-2fa1-11d2-883f-0016d3cca427").Permit(access.Read); (err == nil) != want {
			t.Errorf("%s: %v; want permitted %v", when, err, want)
		}
	}
	permitted("at first", true)
	make("pause.json", "order", "pause", b.path("a.json"), "-reason", "incident 7")
	do("sign", b.path("pause.json"), "-key", b.path("ops"))
	send("pause.json", exitDenied)
	permitted("paused by a monitor", true)
	do("sign", b.path("pause.json"), "-key", b.path("owner"))
	send("pause.json", exitOK)
	permitted("paused by the owner", false)
	send("pause.json", exitDenied)

	make("b.json", slices.Concat([]string{"new", "-monitor", "next=" + keys["next"], "-succeeds", b.path("a.json")}, parties)...)
	for _, who := range []string{"owner", "next"} {
		do("sign", b.path("b.json"), "-key", b.path(who))
	}
	send("b.json", exitDenied)
	do("sign", b.path("b.json"), "-key", b.path("ops")) // an endorsement
	send("b.json", exitOK)
	permitted("succeeded", true)
	send("a.json", exitDenied)
	send("owner.pub", exitError)
}

func TestAgreement(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	keys := make(map[string]string)
	for _, who := range []string{"owner", "ops", "stranger"} {
		code, out, stderr := command(t, "agreement", "keygen", at(who))
		if code != exitOK {
			t.Fatalf("keygen: exit %d: %s", code, stderr)
		}
		keys[who] = strings.TrimSpace(out)
		if st, err := os.Stat(at(who)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("keygen: mode %v, %v; want 0600", st.Mode(), err)
		}
	}
	if code, _, _ := command(t, "agreement", "keygen", at("owner")); code != exitError {
		t.Errorf("keygen over a key that is there: exit %d; want %d", code, exitError)
	}
	code, doc, stderr := command(t, "agreement", "new", "-uuid", "1B4E28BA-2FA1-11D2-883F-0016D3CCA427", "-owner", "acme="+keys["owner"],
		"-monitor", "ops="+keys["ops"], "-permit-read", "-permit-write", "-allow", "kill-process, power-cycle", "-protect", "0-99,1000", "-id", "a-1")
	if code != exitOK {
		t.Fatalf("new: exit %d: %s", code, stderr)
	}
	if err := os.WriteFile(at("a.json"), []byte(doc), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := command(t, "agreement", "verify", at("a.json"), "-owner", keys["owner"]); code != exitDenied {
		t.Errorf("verify unsigned: exit %d: %s; want %d", code, stderr, exitDenied)
	}
	code, out, _ := command(t, "agreement", "sign", at("a.json"), "-key", at("owner"))
	if code != exitOK || !strings.Contains(out, `Still missing: the signature of monitor "ops"`) {
		t.Errorf("sign by the owner: exit %d: %s", code, out)
	}
	if code, _, _ := command(t, "agreement", "sign", at("a.json"), "-key", at("stranger")); code != exitError {
		t.Errorf("sign by a stranger: exit %d; want %d", code, exitError)
	}
	if code, out, _ := command(t, "agreement", "sign", at("a.json"), "-key", at("ops")); code != exitOK || strings.Contains(out, "missing") {
		t.Errorf("sign by the monitor: exit %d: %s", code, out)
	}
	for _, owner := range []string{keys["owner"], "acme=" + keys["owner"]} {
		if code, _, stderr := command(t, "agreement", "verify", at("a.json"), "-owner", owner); code != exitOK {
			t.Errorf("verify: exit %d: %s", code, stderr)
		}
	}
	if code, _, _ := command(t, "agreement", "verify", at("a.json"), "-owner", keys["stranger"]); code != exitDenied {
		t.Errorf("verify with another owner: exit %d; want %d", code, exitDenied)
	}
	code, out, _ = command(t, "agreement", "show", at("a.json"))
	if code != exitOK || !strings.Contains(out, "permits     read yes, write yes, power no") || !strings.Contains(out, "users 0 to 99") {
		t.Errorf("show: exit %d:\n%s", code, out)
	}
	signed, err := os.ReadFile(at("a.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at("signed.json"), signed, 0o600); err != nil {
		t.Fatal(err)
	}
	tampered := strings.Replace(string(signed), `"power": false`, `"power": true`, 1)
	if err := os.WriteFile(at("a.json"), []byte(tampered), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, _ := command(t, "agreement", "verify", at("a.json"), "-owner", keys["owner"]); code != exitDenied {
		t.Errorf("verify a changed agreement: exit %d; want %d", code, exitDenied)
	}
	for _, args := range [][]string{
		{"agreement", "new", "-owner", "acme"},
		{"agreement", "new", "-owner", "acme=AAAA"},
		{"agreement", "new", "-uuid", "x", "-owner", "acme=" + keys["owner"], "-monitor", "ops=" + keys["ops"]},
		{"agreement", "new", "-owner", "acme=" + keys["owner"], "-protect", "9-1"},
		{"agreement", "new", "-owner", "acme=" + keys["owner"], "-monitor", "ops=" + keys["ops"], "-emergency-key", "e=" + keys["stranger"]},
		{"agreement", "order", "stop", at("signed.json")},
		{"agreement", "order", "pause"},
		{"agreement", "order", "break", at("signed.json")},
		{"agreement", "order", "revoke", at("signed.json"), "-for", "1h"},
		{"agreement", "sign", at("a.json")},
		{"agreement", "verify", at("a.json")},
		{"agreement", "show"},
	} {
		if code, _, stderr := command(t, args...); code != exitUsage {
			t.Errorf("%v: exit %d: %s; want %d", args, code, stderr, exitUsage)
		}
	}
}

// TestAgreementMemory makes agreements about memory from the command line alone.
func TestAgreementMemory(t *testing.T) {
	dir := t.TempDir()
	var keys []string
	for _, who := range []string{"owner", "ops"} {
		code, out, stderr := command(t, "agreement", "keygen", filepath.Join(dir, who))
		if code != exitOK {
			t.Fatalf("keygen: exit %d: %s", code, stderr)
		}
		keys = append(keys, strings.TrimSpace(out))
	}
	newOne := func(args ...string) (int, string, string) {
		return command(t, append([]string{"agreement", "new", "-uuid", "1b4e28ba-2fa1-11d2-883f-0016d3cca427", "-owner", "acme=" + keys[0], "-monitor", "ops=" + keys[1],
			"-from", "2030-01-01T00:00:00Z", "-valid", "24h", "-protect", "0/sshd"}, args...)...)
	}
	code, doc, stderr := newOne("-permit-read", "-permit-write", "-memory", "0x100000+0x1000=read,write,atomic", "-memory", "all=read", "-memory", "kernel-text=read",
		"-memory", "symbol/jiffies=read", "-memory", "symbol/log_buf+64=read", "-memory", "process/1000/a=b/c=read, write")
	if code != exitOK {
		t.Fatalf("new: exit %d: %s", code, stderr)
	}
	a, err := access.Parse(strings.NewReader(doc))
	if err != nil {
		t.Fatal(err)
	}
	uid := uint32(1000)
	want := []access.Memory{
		{Start: 0x100000, Size: 0x1000, Read: true, Write: true, Atomic: true}, {All: true, Read: true}, {KernelText: true, Read: true},
		{Symbol: "jiffies", Read: true}, {Symbol: "log_buf", Size: 64, Read: true}, {Process: &access.Process{UID: &uid, Comm: "a=b/c"}, Read: true, Write: true},
	}
	if diff := cmp.Diff(want, a.Rights.Memory); diff != "" {
		t.Errorf("rights.memory (-want +got):\n%s", diff)
	}
	if got := a.ValidUntil.Format(time.RFC3339); got != "2030-01-02T00:00:00Z" || a.Protected[0].Comm != "sshd" {
		t.Errorf("until %s, protected %+v", got, a.Protected)
	}
	code, doc, stderr = newOne("-allow", "power-cycle,kill-process", "-rate", "power-cycle=3/24h", "-rate", "kill-process=10/1m", "-detectors", "panic, policy/miner")
	if a, err = access.Parse(strings.NewReader(doc)); code != exitOK || err != nil {
		t.Fatalf("new: exit %d: %s; %v", code, stderr, err)
	}
	if diff := cmp.Diff(access.Rights{Actions: []string{"power-cycle", "kill-process"}, Detectors: []string{"panic", "policy/miner"},
		Rates: []access.Rate{{Action: "power-cycle", Most: 3, Within: 86400}, {Action: "kill-process", Most: 10, Within: 60}}}, a.Rights); diff != "" {
		t.Errorf("rights (-want +got):\n%s", diff)
	}
	for _, wrong := range []string{"", "power-cycle", "power-cycle=3", "power-cycle=/1h", "power-cycle=x/1h", "power-cycle=3/", "power-cycle=3/1500ms", "power-cycle=0/1h", "power-cycle=1/1000h", "kill-process=1/1h", "=1/1h"} {
		if code, _, stderr := newOne("-allow", "power-cycle", "-rate", wrong); code != exitUsage || stderr == "" {
			t.Errorf("-rate %q: exit %d: %s", wrong, code, stderr)
		}
	}
	code, doc, stderr = newOne("-allow", "set-sysctl", "-value", "kernel.panic=-1..60", "-value", "kernel.pid_max=32K..max")
	if a, err = access.Parse(strings.NewReader(doc)); code != exitOK || err != nil {
		t.Fatalf("new: exit %d: %s; %v", code, stderr, err)
	}
	if diff := cmp.Diff([]access.ValueRange{{Action: "set-sysctl", Name: "kernel.panic", Min: -1, Max: 60}, {Action: "set-sysctl", Name: "kernel.pid_max", Min: 32 << 10, Max: 4 << 20}}, a.Rights.Values); diff != "" {
		t.Errorf("rights.values (-want +got):\n%s", diff)
	}
	for _, wrong := range []string{"", "kernel.panic", "kernel.panic=5", "kernel.panic=5..", "kernel.panic=7..5", "kernel.panic=90000..90001", "kernel.core_pattern=1..2", "kernel.panic=a..b"} {
		if code, _, stderr := newOne("-allow", "set-sysctl", "-value", wrong); code != exitUsage || stderr == "" {
			t.Errorf("-value %q: exit %d: %s", wrong, code, stderr)
		}
	}
	for _, wrong := range []string{"*", "panic,panic", "two words"} {
		if code, _, stderr := newOne("-detectors", wrong); code != exitUsage || stderr == "" {
			t.Errorf("-detectors %q: exit %d: %s", wrong, code, stderr)
		}
	}
	for _, wrong := range []string{"", "all", "all=", "all=execute", "all/x=read", "=read", "0x1000=read", "0x1000+=read", "0x1000+0=read", "2+18446744073709551615=read", "x+1=read", "symbol=read", "symbol/=read",
		"symbol/a b=read", "symbol/a+0=read", "symbol/a+x=read", "process/1000=read", "process/root/x=read", "process/-1/x=read", "process/0/sixteen-letters-x=read", "process/0/sshd=read", "kernelText=read"} {
		if code, _, stderr := newOne("-permit-read", "-memory", wrong); code != exitUsage || stderr == "" {
			t.Errorf("-memory %q: exit %d: %s", wrong, code, stderr)
		}
	}
	for _, args := range [][]string{{"-memory", "all=read"}, {"-permit-read", "-memory", "all=read,write"}, {"-permit-read", "-memory", "all=atomic"}, {"-from", "tomorrow"}, {"-protect", "0/"}} {
		if code, _, _ := newOne(args...); code != exitUsage {
			t.Errorf("%v: exit %d", args, code)
		}
	}
}

func TestJournalFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	j, err := journal.OpenFile(path, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if _, err := j.Write("intent", map[string]int{"step": i}); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if code, out, stderr := command(t, "journal", "-file", path, "-verify"); code != exitOK || !strings.Contains(out, "3 records, 1 to 3") {
		t.Errorf("journal -verify: exit %d: %s%s", code, out, stderr)
	}
	if code, out, stderr := command(t, "journal", "-file", path, "-n", "2"); code != exitOK || strings.Contains(out, `{"step":0}`) || !strings.Contains(out, `{"step":2}`) {
		t.Errorf("journal -n 2: exit %d: %s%s", code, out, stderr)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	i := bytes.Index(data, []byte(`{"step":1}`))
	if i < 0 {
		t.Fatal("the record is not in the file")
	}
	data[i+8] = '7'
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if code, out, _ := command(t, "journal", "-file", path, "-verify"); code != exitError && !strings.Contains(out, "lost") {
		t.Errorf("journal -verify of a changed journal: exit %d: %s", code, out)
	} else if strings.Contains(out, "3 records, 1 to 3") {
		t.Errorf("journal -verify of a changed journal: %s", out)
	}
	if code, _, _ := command(t, "journal", "-file", path+"-not", "-verify"); code != exitError {
		t.Errorf("journal of a missing file: exit %d; want %d", code, exitError)
	}
}

// lineWriter passes on whole writes.
type lineWriter chan string

func (w lineWriter) Write(b []byte) (int, error) { w <- string(b); return len(b), nil }

// until reads what is written until it holds want.
func (w lineWriter) until(t *testing.T, want string) string {
	t.Helper()
	var all strings.Builder
	for {
		select {
		case s := <-w:
			all.WriteString(s)
			if strings.Contains(all.String(), want) {
				return all.String()
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("no %q in %q", want, all.String())
		}
	}
}

func TestFollow(t *testing.T) {
	b := newBench(t)
	if code, _, stderr := b.run("login -host $URL -fingerprint $PIN -context dpu -password-file $DIR/initial -new-password-file $DIR/new", ""); code != exitOK {
		t.Fatalf("login: exit %d: %s", code, stderr)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out, errs := make(lineWriter, 100), make(lineWriter, 100)
	code := make(chan int, 1)
	go func() {
		code <- run(ctx, []string{"-config", b.path("contexts.json"), "dmesg", "-w", "-interval", "100ms"}, strings.NewReader(""), out, errs)
	}()
	out.until(t, "evil")
	add := func(seq uint64, text string) {
		b.agent.do(func() { b.agent.records = append(b.agent.records, kernel.LogRecord{Seq: seq, Level: 6, Text: text}) })
	}
	add(3, "first new line")
	if got := out.until(t, "first new line"); strings.Contains(got, "Linux version") {
		t.Errorf("dmesg -w repeats itself: %q", got)
	}
	// The ring turns: the oldest records go, and nothing is shown twice or lost.
	b.agent.do(func() { b.agent.records = b.agent.records[2:] })
	add(4, "second new line")
	if got := out.until(t, "second new line"); strings.Contains(got, "first new line") {
		t.Errorf("dmesg -w repeats itself: %q", got)
	}
	// The host reboots: for a while there is no kernel, and the next one counts from zero.
	b.agent.do(func() { b.agent.detached = true })
	errs.until(t, "waiting: ")
	b.agent.do(func() {
		b.agent.detached = false
		b.agent.records = []kernel.LogRecord{{Seq: 0, Level: 6, Text: "after the reboot"}}
	})
	errs.until(t, "the host has rebooted")
	out.until(t, "after the reboot")
	cancel()
	select {
	case c := <-code:
		if c != exitOK {
			t.Errorf("dmesg -w interrupted: exit %d", c)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("dmesg -w does not end")
	}
}

func TestStatusOfEveryPhase(t *testing.T) {
	for _, phase := range []engine.Phase{engine.NoMemory, engine.Searching, engine.Attached, engine.Lost} {
		for _, h := range []engine.Health{engine.Healthy, engine.Ill, engine.CouldNotTell, ""} {
			s := statusOf(engine.State{Phase: phase, Health: h, Progress: &engine.Progress{Stage: "search", Done: 1, Total: 4}}, boot)
			if want := map[engine.Health]string{engine.Healthy: "yes", engine.Ill: "no"}[h]; want != "" && string(s.Health) != want || want == "" && s.Health != "could-not-tell" {
				t.Errorf("statusOf(%s, %s) = %s", phase, h, s.Health)
			}
		}
	}
}

func TestHarmless(t *testing.T) {
	in := map[string]string{"a": "\x1b\u009b\u202e\U000e0001\x7f", "b": "Grüße 中"}
	b, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	got := harmless(b)
	if want := `{"a":"\u001b\u009b\u202e\udb40\udc01\u007f","b":"Grüße 中"}`; string(got) != want {
		t.Errorf("harmless(%q) = %s; want %s", b, got, want)
	}
	var back map[string]string
	if err := json.Unmarshal(got, &back); err != nil || back["a"] != in["a"] || back["b"] != in["b"] {
		t.Errorf("harmless(%q) means %q, %v", b, back, err)
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		code, script, _ := command(t, "completion", shell)
		if code != exitOK {
			t.Errorf("completion %s: exit %d", shell, code)
		}
		for _, v := range verbs() {
			if !strings.Contains(script, v.name) {
				t.Errorf("completion %s: lacks %s", shell, v.name)
			}
		}
	}
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip("bash is not installed: its script is only looked at, not run")
	}
	_, script, _ := command(t, "completion", "bash")
	for line, want := range map[string][]string{
		"backdoor st":          {"status", "stack"},
		"backdoor -json sta":   {"status", "stack"},
		"backdoor power n":     {"nmi"},
		"backdoor heal -dry":   {"-dry-run"},
		"backdoor help jour":   {"journal"},
		"backdoor ps -fing":    {"-fingerprint"},
		"backdoor agreement v": {"verify"},
		"backdoor completion ": {"bash", "zsh", "fish"},
	} {
		words := strings.Fields(line)
		if strings.HasSuffix(line, " ") {
			words = append(words, "")
		}
		quoted := make([]string, len(words))
		for i, w := range words {
			quoted[i] = "'" + w + "'"
		}
		cmd := exec.CommandContext(t.Context(), bash, "--norc", "-c", script+"\nCOMP_WORDS=("+strings.Join(quoted, " ")+")\nCOMP_CWORD=$((${#COMP_WORDS[@]}-1))\n_backdoor\nprintf '%s\\n' \"${COMPREPLY[@]}\"")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("completion of %q: %v\n%s", line, err, out)
			continue
		}
		if got := strings.Fields(string(out)); !slices.Equal(got, want) {
			t.Errorf("completion of %q = %q; want %q", line, got, want)
		}
	}
}

// Whoever answers at the other end, the command ends with an error and not with a crash.
func TestForeignServices(t *testing.T) {
	for name, h := range map[string]http.HandlerFunc{
		"not Redfish": func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") },
		"another Redfish service": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Auth-Token", "t")
			w.Header().Set("Location", "/redfish/v1/SessionService/Sessions/1")
			if r.Method == http.MethodPost {
				w.WriteHeader(http.StatusCreated)
			}
			io.WriteString(w, `{"Members":[{"@odata.id":"/x","Id":"x","Oem":{}}]}`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			url, pin := serveTLS(t, h)
			for _, verb := range []string{"status", "findings", "ps", "dmesg", "journal"} {
				dir := t.TempDir()
				password := filepath.Join(dir, "p")
				if err := os.WriteFile(password, []byte("x\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				code, stdout, stderr := command(t, "-host", url, "-fingerprint", pin, "-password-file", password, "-timeout", "5s", verb)
				if code == exitOK || stderr == "" && stdout == "" {
					t.Errorf("%s at %s: exit %d\n%s%s", verb, name, code, stdout, stderr)
				}
			}
		})
	}
}

func serveTLS(t *testing.T, h http.Handler) (url, pin string) {
	t.Helper()
	s := httptest.NewTLSServer(h)
	t.Cleanup(s.Close)
	return s.URL, fingerprint(s.Certificate())
}

// What became of a plan that is not to end its finding is no failure; what was taken back, or has failed, is.
func TestOutcomeText(t *testing.T) {
	for want, o := range map[string]heal.Outcome{
		"Repaired and verified: set x\n":                        {Plan: heal.Plan{Title: "set x"}, Verified: true},
		"Done, and the finding stands: set x\n":                 {Plan: heal.Plan{Title: "set x", More: true}},
		"NOT verified: set x\n":                                 {Plan: heal.Plan{Title: "set x"}},
		"NOT verified: set x\n  error        why\n":             {Plan: heal.Plan{Title: "set x", More: true}, Error: "why"},
		"NOT repaired, and every write was taken back: set x\n": {Plan: heal.Plan{Title: "set x", More: true}, Undone: true},
	} {
		var b strings.Builder
		if err := outcomeText(&b, o); err != nil || !strings.HasPrefix(b.String(), want) {
			t.Errorf("%+v: %q, %v; want %q", o, b.String(), err, want)
		}
	}
}
