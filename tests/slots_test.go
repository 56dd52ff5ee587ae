package tests

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"flag"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/agent/engine"
	"github.com/backdoor-rhs/backdoor/boot/attest"
	"github.com/backdoor-rhs/backdoor/boot/slot"
	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
	"github.com/backdoor-rhs/backdoor/tests/lab"
	"github.com/backdoor-rhs/backdoor/tests/operator"
)

var thorough = flag.Bool("thorough", false, "have TestSlots wait for watchdogs too, which takes minutes")

var (
	goodLine        = regexp.MustCompile(`msg="the image is good" slot=(\S+) version=(\S+)`)
	certificateLine = regexp.MustCompile(`^backdoord: Redfish on \S+, certificate SHA-256 ([0-9a-f]{64})`)
)

// slots is a lab whose DPU is started from slots.
type slots struct {
	t    *testing.T
	lab  *lab.Lab
	dpu  *lab.DPU
	ek   attest.Digest  // of its TPM
	ca   *x509.CertPool // has certified its attestation key
	mark int            // of the console, before the last start
}

// TestSlots starts the DPU as a real one is: by a loader that chooses, verifies and measures what it starts. Whatever is wrong with the image in
// a slot, the machine has to start the right one, and its agent has to say why and to prove what it is. The loader is given by QEMU's
// -kernel, in the place of a ROM.
func TestSlots(t *testing.T) {
	needLab(t)
	limit := 12 * time.Minute // on a busy machine; a minute and a half on a quiet one
	if *thorough {
		limit += 10 * time.Minute
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	l, err := lab.Up(ctx, lab.Config{Slots: true, HostMemory: 256 << 20, Log: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if t.Failed() {
			for _, line := range l.DPU.Console().Tail(60) {
				t.Log(line)
			}
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}()
	s := &slots{t: t, lab: l, dpu: l.DPU}
	t.Logf("power on to the first answer: %.1f s", l.DPU.BootTook.Seconds())
	s.wantGood(ctx, slot.A, "1.0.0")
	first := s.dpu.Fingerprint
	s.pin(ctx)
	s.enroll(ctx)
	s.attest(ctx, s.dpu.Slots.Bundle, "1.0.0")
	s.agreement(ctx, "")
	s.dpu.PowerOff()
	unpaused, err := s.dpu.ReadState(lockFile)
	s.must(err)
	var paused []byte

	s.story("an image with a changed byte is passed over", func() {
		s.install(lab.Release{Version: "1.1.0"})
		s.must(s.dpu.Slots.Tamper(slot.B, 20<<20))
		s.boot(ctx)
		s.wantGood(ctx, slot.A, "1.0.0")
		s.wantBad(slot.B, "damaged")
		s.attest(ctx, s.dpu.Slots.Bundle, "1.0.0") // its PCR is not spoiled by the attempt
		s.order(ctx, access.Pause, 1)
	})
	s.story("an image that panics is given up", func() {
		s.install(lab.Release{Version: "1.2.0", Arguments: "rdinit=/nothing init=/nothing"})
		// Meanwhile somebody with the disk in his hands puts back what the agreement's lock was before its owner's pause.
		paused, err = s.dpu.ReadState(lockFile)
		s.must(err)
		s.must(s.dpu.WriteState(map[string][]byte{lockFile: unpaused}))
		if !*thorough { // otherwise all three starts are waited for
			s.count(slot.B, slot.TrialBoots-1)
		}
		began := time.Now()
		s.boot(ctx)
		s.wantGood(ctx, slot.A, "1.0.0")
		s.t.Logf("from power on, through the panics, to the other image's first answer: %.1f s", time.Since(began).Seconds())
		s.wantBad(slot.B, "never said that it is good")
		s.agreement(ctx, "is not the file that the TPM knows")
		s.dpu.PowerOff()
		s.must(s.dpu.WriteState(map[string][]byte{lockFile: paused}))
	})
	if *thorough {
		s.story("an image that hangs is given up by the watchdog", func() {
			s.install(lab.Release{Version: "1.3.0", Arguments: "rdinit=/bbin/cat"}) // it reads the console, for ever
			s.count(slot.B, slot.TrialBoots-1)
			s.boot(ctx)
			s.wantGood(ctx, slot.A, "1.0.0")
			s.wantBad(slot.B, "never said that it is good")
			if !s.said("the watchdog has reset the machine") {
				s.t.Error("the loader does not say that the watchdog has reset the machine")
			}
		})
		s.story("an agent that cannot open its window is given up", func() {
			// Under lockdown the kernel gives nobody a PCI device's memory.
			s.install(lab.Release{Version: "1.4.0", Arguments: "lsm=lockdown lockdown=integrity"})
			s.count(slot.B, slot.TrialBoots-1)
			s.boot(ctx)
			s.wantGood(ctx, slot.A, "1.0.0")
			s.wantBad(slot.B, "window")
		})
	}
	epoch1, err := s.dpu.Slots.Read()
	if err != nil {
		t.Fatal(err)
	}
	s.story("an update keeps the agent's identity, and raises the epoch", func() {
		file := filepath.Join(s.t.TempDir(), "2.bundle")
		s.must(s.dpu.Slots.Make(file, lab.Release{Version: "2.0.0", Epoch: 2}))
		s.boot(ctx)
		s.wantGood(ctx, slot.A, "1.0.0")
		s.agreement(ctx, "the owner has paused")
		s.order(ctx, access.Resume, 2)
		s.push(ctx, file)
		s.wantGood(ctx, slot.B, "2.0.0")
		s.agreement(ctx, "")
		s.settled(ctx, 2)
		s.boot(ctx) // the loader raises the TPM's counter
		s.wantGood(ctx, slot.B, "2.0.0")
		if s.dpu.Fingerprint != first {
			s.t.Errorf("the certificate is %s after the update; it was %s", s.dpu.Fingerprint, first)
		}
		s.attest(ctx, file, "2.0.0")
		c := s.client()
		image, err := s.dpu.Slots.Image(s.dpu.Slots.Bundle)
		s.must(err)
		_, err = c.Attest(ctx, client.Attestation{EndorsementKeys: []attest.Digest{s.ek}, Policy: attest.Policy{Images: []attest.Image{image}}})
		if err == nil || !strings.Contains(err.Error(), "image: got backdoor 2.0.0") {
			s.t.Errorf("Attest() against the old image = %v; want it to name 2.0.0", err)
		}
	})
	s.story("the disk of before the epoch rose starts nothing", func() {
		s.dpu.PowerOff()
		now, err := s.dpu.Slots.Read()
		s.must(err)
		s.must(s.dpu.Slots.Write(epoch1))
		mark := s.dpu.Console().Mark()
		s.must(s.dpu.PowerOn(ctx))
		wait, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		if _, err := s.dpu.Console().Wait(wait, mark, regexp.MustCompile(`backdoor-loader: .*(too-old|no slot).*resetting`)); err != nil {
			s.t.Errorf("the loader does not refuse the old disk: %v", err)
		}
		s.dpu.PowerOff()
		s.must(s.dpu.Slots.Write(now))
		s.boot(ctx)
		s.wantGood(ctx, slot.B, "2.0.0")
	})
}

// lockFile holds the access agreement and the orders about it, in the agent's state.
const lockFile = "agreement.lock"

// agreement waits until the agent says why it permits nothing; empty: until the agreement holds.
func (s *slots) agreement(ctx context.Context, denied string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	agent := operator.Agent{Client: s.client()}
	st, err := agent.WaitState(ctx, "the agreement to be judged", func(st engine.State) bool {
		return st.Agreement != nil && strings.Contains(st.Agreement.Denied, denied) && (denied != "" || st.Agreement.Denied == "")
	})
	if err != nil {
		s.t.Errorf("the agreement is %+v; want it denied because %q: %v", st.Agreement, denied, err)
	}
}

// order has the owner give an order about the agreement.
func (s *slots) order(ctx context.Context, what string, sequence uint64) {
	s.t.Helper()
	agent := operator.Agent{Client: s.client()}
	st, err := agent.State(ctx)
	s.must(err)
	key, err := s.lab.Key("owner")
	s.must(err)
	o := &access.Order{Version: access.Version, Agreement: st.Agreement.Digest, Sequence: sequence, Order: what, Issued: time.Now().UTC().Truncate(time.Second), Reason: "a test"}
	s.must(o.Sign(key))
	doc, err := json.Marshal(o)
	s.must(err)
	s.must(agent.ObeyOrder(ctx, doc))
}

// settled waits until the disk says that nothing below an epoch is started any more: the recovery image was renewed for it.
func (s *slots) settled(ctx context.Context, epoch uint32) {
	s.t.Helper()
	for {
		st, err := s.dpu.Slots.State()
		if err == nil && st.Epoch >= epoch {
			return
		}
		select {
		case <-ctx.Done():
			s.t.Fatalf("the slots' epoch is %d, %v; want %d", st.Epoch, err, epoch)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// story is one thing that happens to the DPU. Each begins where the one before has left the machine.
func (s *slots) story(name string, tell func()) {
	s.t.Helper()
	whole := s.t
	ok := whole.Run(name, func(t *testing.T) {
		s.t = t
		began := time.Now()
		tell()
		t.Logf("%.1f s", time.Since(began).Seconds())
	})
	s.t = whole
	if !ok {
		whole.FailNow()
	}
}

func (s *slots) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *slots) install(r lab.Release) {
	s.t.Helper()
	s.dpu.PowerOff()
	s.must(s.dpu.Slots.Install(r))
}

// count notes n starts of a slot that came to nothing.
func (s *slots) count(of slot.Name, n int) {
	s.t.Helper()
	for range n {
		s.must(s.dpu.Slots.Count(of))
	}
}

func (s *slots) boot(ctx context.Context) {
	s.t.Helper()
	s.dpu.PowerOff()
	s.mark = s.dpu.Console().Mark()
	s.must(s.dpu.Restart(ctx))
}

func (s *slots) said(text string) bool {
	for _, l := range s.dpu.Console().Since(s.mark) {
		if strings.Contains(l.Text, text) {
			return true
		}
	}
	return false
}

// wantGood waits until the running image says that it is good, and is the right one.
func (s *slots) wantGood(ctx context.Context, n slot.Name, version string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	l, err := s.dpu.Console().Wait(ctx, s.mark, goodLine)
	if err != nil {
		s.t.Fatalf("no image says that it is good: %v", err)
	}
	if m := goodLine.FindStringSubmatch(l.Text); m[1] != string(n) || m[2] != version {
		s.t.Errorf("slot %s with version %s runs; want slot %s with version %s", m[1], m[2], n, version)
	}
	// Images that were passed over may have shown certificates of their own: the keys are sealed to others than they are.
	for _, l := range s.dpu.Console().Since(s.mark) {
		if m := certificateLine.FindStringSubmatch(l.Text); m != nil {
			s.dpu.Fingerprint = m[1]
		}
	}
	st, err := s.dpu.Slots.State()
	for err == nil && (st.Active != n || st.Slot(n).Status != slot.Good) && ctx.Err() == nil {
		time.Sleep(50 * time.Millisecond) // the guest's write is on its way
		st, err = s.dpu.Slots.State()
	}
	if err != nil || st.Active != n || st.Slot(n).Status != slot.Good {
		s.t.Errorf("the state says %+v, %v; want slot %s active and good", st, err, n)
	}
}

// wantBad looks for the reason where the machine keeps it, and where it tells it: over Redfish.
func (s *slots) wantBad(n slot.Name, reason string) {
	s.t.Helper()
	st, err := s.dpu.Slots.State()
	if err != nil || st.Slot(n).Status != slot.Bad || !strings.Contains(st.Slot(n).Reason, reason) {
		s.t.Errorf("slot %s is %q because %q, %v; want it bad because of %q", n, st.Slot(n).Status, st.Slot(n).Reason, err, reason)
	}
	if !s.said("another image runs than the one that was to run") {
		s.t.Error("the agent's log does not say that another image runs")
	}
	var item schema.SoftwareInventory
	s.must(s.client().Get(s.t.Context(), client.UpdateURI+"/FirmwareInventory/slot-"+string(n), &item))
	if !slices.ContainsFunc(item.Status.Conditions, func(c schema.Condition) bool { return strings.Contains(c.Message, reason) }) {
		s.t.Errorf("over Redfish, slot %s has the conditions %+v; want one that says %q", n, item.Status.Conditions, reason)
	}
}

func (s *slots) client() *client.Client {
	s.t.Helper()
	c, err := s.dpu.Redfish()
	s.must(err)
	s.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		c.Close(ctx) //nolint:errcheck // the machine is often off by then
	})
	return c
}

// pin learns the TPM's endorsement key, as an owner does when the machine is set up.
func (s *slots) pin(ctx context.Context) {
	s.t.Helper()
	got, err := s.client().Attest(ctx, client.Attestation{})
	if err == nil || got == nil || got.EndorsementKey == (attest.Digest{}) {
		s.t.Fatalf("Attest() that trusts nothing = %+v, %v", got, err)
	}
	s.ek = got.EndorsementKey
}

// enroll has an authority certify the TPM, as an owner does for his monitors: by the command, which first is given another machine's endorsement
// key; and has a monitor that knows the authority alone ask for the proof.
func (s *slots) enroll(ctx context.Context) {
	s.t.Helper()
	dir, program := s.t.TempDir(), buildCommand(s.t)
	write := func(name, kind string, data []byte) string {
		path := filepath.Join(dir, name)
		if kind != "" {
			data = pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: data})
		}
		s.must(os.WriteFile(path, data, 0o600))
		return path
	}
	authority := func(name string) (*x509.Certificate, string, string) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		s.must(err)
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		s.must(err)
		cert, err := x509.ParseCertificate(der)
		s.must(err)
		private, err := x509.MarshalPKCS8PrivateKey(key)
		s.must(err)
		return cert, write(name+".pem", "CERTIFICATE", der), write(name+".key", "PRIVATE KEY", private)
	}
	cert, ca, key := authority("owner")
	_, other, _ := authority("other")
	at := []string{"-host", s.dpu.URL, "-fingerprint", s.dpu.Fingerprint, "-user", s.dpu.User, "-password-file", write("password", "", []byte(s.dpu.Password))}
	for _, run := range []struct {
		verb, want string
		exit       int
		args       []string
	}{
		{"enroll", "endorsement key", 3, []string{"-ek", strings.Repeat("ab", 32), "-ak-ca", ca, "-ak-ca-key", key}},
		{"enroll", "dpu7: certified by owner until", 0, []string{"-ek", s.ek.String(), "-ak-ca", ca, "-ak-ca-key", key, "-as", "dpu7", "-bundle", s.dpu.Slots.Bundle}},
		{"attest", "attested: backdoor 1.0.0", 0, []string{"-ak-ca", ca, "-bundle", s.dpu.Slots.Bundle}},
		{"attest", "not attested", 3, []string{"-ak-ca", other, "-bundle", s.dpu.Slots.Bundle}},
	} {
		c := exec.CommandContext(ctx, program, slices.Concat([]string{run.verb}, at, run.args)...)
		c.Env = append(os.Environ(), "HOME="+dir, "XDG_CONFIG_HOME="+dir) // no contexts of whoever runs the test
		out, _ := c.CombinedOutput()                                      // its exit status is looked at
		if got := c.ProcessState.ExitCode(); got != run.exit || !strings.Contains(string(out), run.want) {
			s.t.Errorf("backdoor %s %s: exit %d; want %d and %q in\n%s", run.verb, run.args, got, run.exit, run.want, out)
		}
	}
	s.ca = x509.NewCertPool()
	s.ca.AddCert(cert)
}

// attest has the agent prove that it runs the image of a bundle: to who knows its endorsement key, and to who knows the authority alone.
func (s *slots) attest(ctx context.Context, bundle, version string) {
	s.t.Helper()
	image, err := s.dpu.Slots.Image(bundle)
	s.must(err)
	for name, want := range map[string]client.Attestation{
		"endorsement key": {EndorsementKeys: []attest.Digest{s.ek}, Policy: attest.Policy{Images: []attest.Image{image}}},
		"authority":       {Policy: attest.Policy{Roots: s.ca, Images: []attest.Image{image}}},
	} {
		if got, err := s.client().Attest(ctx, want); err != nil || got.Version != version {
			s.t.Errorf("Attest() by %s = %+v, %v; want version %s", name, got, err, version)
		}
	}
}

// push updates the DPU over Redfish and waits until it starts again.
func (s *slots) push(ctx context.Context, file string) {
	s.t.Helper()
	f, err := os.Open(file)
	s.must(err)
	defer f.Close()
	st, err := f.Stat()
	s.must(err)
	s.mark = s.dpu.Console().Mark()
	_, err = s.client().Push(ctx, f, st.Size(), client.PushOptions{Apply: "Immediate"}, nil)
	s.must(err)
}
