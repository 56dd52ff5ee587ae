// Package attesttest starts software TPMs (swtpm) for tests.
package attesttest

import (
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/boot/attest"
)

// Start switches a TPM on whose memory lies in dir, and off when the test ends or stop is called. A second Start in the same
// directory, after stop, is a reset of the machine.
func Start(t testing.TB, dir string) (tpm *attest.TPM, stop func()) {
	t.Helper()
	program, err := exec.LookPath("swtpm")
	if err != nil {
		t.Fatalf("%v: make setup installs it", err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	near, far := os.NewFile(uintptr(pair[0]), "tpm"), os.NewFile(uintptr(pair[1]), "swtpm")
	defer near.Close()
	defer far.Close()
	cmd := exec.Command(program, "socket", "--tpm2", "--tpmstate", "dir="+dir, "--fd", "3", "--flags", "not-need-init,startup-clear")
	cmd.ExtraFiles = []*os.File{far}
	cmd.Stderr = t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	conn, err := net.FileConn(near)
	if err != nil {
		t.Fatal(err)
	}
	tpm = attest.New(transport.FromReadWriteCloser(conn))
	off := false
	stop = func() {
		if off {
			return
		}
		off = true
		tpm.Close() // swtpm ends with its only client
		kill := time.AfterFunc(5*time.Second, func() { cmd.Process.Kill() })
		defer kill.Stop()
		if err := cmd.Wait(); err != nil {
			t.Logf("swtpm: %v", err)
		}
	}
	t.Cleanup(stop)
	return tpm, stop
}
