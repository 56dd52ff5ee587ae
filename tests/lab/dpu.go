package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/client"
	"github.com/backdoor-rhs/backdoor/tests/lab/qmp"
	"github.com/backdoor-rhs/backdoor/tests/lab/wire"
	"golang.org/x/sys/unix"
)

// dpuMemory is the DPU's RAM in MiB.
const dpuMemory = 512

// DPU is the machine that heals. It is safe for concurrent use; its fields do not change after Up.
type DPU struct {
	// URL is the Redfish service on loopback, "https://127.0.0.1:port".
	URL string
	// InitialPassword is what the DPU's console printed at its first boot.
	InitialPassword string
	// User and Password are good now: Up has changed the initial password, unless Config.InitialPassword says otherwise.
	User, Password string
	// CA is the PEM certificate that the service presents, Fingerprint its SHA-256 in hexadecimal as the console printed it.
	CA          []byte
	Fingerprint string
	// StateDir has what the state disk was made from: configuration, policy, agreement.
	StateDir string
	// BootTook is the time from QEMU's start to the first answer of the Redfish service.
	BootTook time.Duration
	// Slots is the disk that the DPU is started from; nil without Config.Slots.
	Slots *Slots

	machine *machine
	disk    string // image of the state disk
	redfish *port
	log     *os.File
	events  *trail[Event]

	mu    sync.Mutex
	swtpm *process   // guarded by mu; nil while the DPU is off
	port  *wire.Port // guarded by mu; nil while the DPU is off
	cable *wire.Port // guarded by mu; nil while the DPU is off, and without Config.Datapath

	started   int       // the console's mark at the latest start; guarded by mu
	poweredOn time.Time // guarded by mu
}

// What the agent prints on the console.
var (
	initialLine = regexp.MustCompile(`^backdoord: log in as "([^"]+)" with the initial password "([^"]+)"`)
	serviceLine = regexp.MustCompile(`^backdoord: Redfish on \S+, certificate SHA-256 ([0-9a-f]{64})`)
	dpuTrouble  = regexp.MustCompile(`Kernel panic - not syncing`)
)

// newDPU prepares the DPU; it is off.
func newDPU(dir string, cfg Config, l *Lab) (*DPU, error) {
	h, sw, cable := l.Host, l.Wire, l.Cable
	d := &DPU{StateDir: filepath.Join(dir, "dpu-state"), events: newTrail[Event](10000)}
	tpm := filepath.Join(dir, "tpm")
	for _, sub := range []string{d.StateDir, tpm} {
		if err := os.MkdirAll(sub, 0o700); err != nil {
			return nil, &InfraError{Op: "make the DPU's state", Err: err}
		}
	}
	keys, err := writeState(d.StateDir, cfg, l)
	if err != nil {
		return nil, err
	}
	if err := keys.keep(dir); err != nil {
		return nil, err
	}
	disk := filepath.Join(dir, "dpu-state.img")
	d.disk = disk
	if err := makeDisk(disk, d.StateDir); err != nil {
		return nil, err
	}
	if cfg.Slots {
		if d.Slots, err = makeSlots(dir, cfg); err != nil {
			return nil, err
		}
		d.Slots.dpu = d
	}
	if d.log, err = logFile(filepath.Join(dir, "dpu-console.log")); err != nil {
		return nil, err
	}
	if d.redfish, err = reserve(); err != nil {
		d.log.Close()
		return nil, err
	}
	d.URL = "https://" + d.redfish.String()
	d.machine = &machine{
		name: "dpu", program: "qemu-system-aarch64", console: newConsole(d.log), onEnd: d.ended,
		onEvent: func(e qmp.Event) { d.events.add(Event{e.At, e.Name, e.Data}) },
		args: func(f *fds) ([]string, error) {
			mem, err := h.ram.dup()
			if err != nil {
				return nil, err
			}
			memFD := f.add(mem)
			tpmFD, err := d.startTPM(f, tpm)
			if err != nil {
				return nil, err
			}
			p, far, err := sw.Socket("dpu")
			if err != nil {
				return nil, &InfraError{Op: "plug the DPU into the wire", Err: err}
			}
			wireFD := f.add(far)
			d.mu.Lock()
			d.port = p
			d.mu.Unlock()
			var host []string // the card that HOST's cable leads to
			if cable != nil {
				p, far, err := cable.Socket("dpu")
				if err != nil {
					return nil, &InfraError{Op: "plug the DPU into the host's cable", Err: err}
				}
				d.mu.Lock()
				d.cable = p
				d.mu.Unlock()
				host = []string{
					"-netdev", fmt.Sprintf("dgram,id=cable,local.type=fd,local.str=%d", f.add(far)),
					"-device", "virtio-net-pci,netdev=cable,romfile=,mac=" + dpuCableMAC,
				}
			}
			// With the magic sysrq tests can kill the agent.
			start := []string{"-kernel", cfg.DPUKernel, "-initrd", cfg.DPUImage, "-append", commandLine("dpu-arm64") + " sysrq_always_enabled"}
			if d.Slots != nil {
				start = d.Slots.args(cfg)
			}
			return append([]string{
				"-machine", "virt", "-accel", "tcg,thread=multi", "-cpu", "cortex-a57", "-m", fmt.Sprintf("%dM", dpuMemory),
				// With one possible CPU, QEMU's atomic instructions would not be atomic against the host's.
				"-smp", "1,maxcpus=2",
				"-object", fmt.Sprintf("memory-backend-file,id=hostram,size=%dM,mem-path=/proc/self/fd/%d,share=on", cfg.HostMemory>>20, memFD),
				"-device", "ivshmem-plain,memdev=hostram",
				"-chardev", fmt.Sprintf("socket,id=tpm,fd=%d", tpmFD), "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-tis-device,tpmdev=tpm0",
				"-drive", "if=none,id=state,format=raw,file=" + disk, "-device", "virtio-blk-pci,drive=state",
				"-netdev", fmt.Sprintf("user,id=net0,hostfwd=tcp:%v-:443", d.redfish), "-device", "virtio-net-pci,netdev=net0,romfile=,mac=" + dpuMAC,
				"-netdev", fmt.Sprintf("dgram,id=wire,local.type=fd,local.str=%d", wireFD),
				"-device", fmt.Sprintf("virtio-net-pci,netdev=wire,romfile=,host_mtu=%d,mac=%s", cfg.wireMTU(), dpuWireMAC),
			}, append(host, start...)...), nil
		},
	}
	return d, nil
}

// startTPM starts swtpm and returns the number of QEMU's end of its control channel. The TPM's state outlives it.
func (d *DPU) startTPM(f *fds, dir string) (int, error) {
	near, far, err := socketpair(unix.SOCK_STREAM)
	if err != nil {
		return 0, err
	}
	defer near.Close()
	own := fds{}
	fd := own.add(near)
	p, err := start("swtpm", []string{
		"socket", "--tpm2", "--tpmstate", "dir=" + dir, "--ctrl", fmt.Sprintf("type=unixio,clientfd=%d", fd),
		"--flags", "startup-clear", "--terminate",
	}, own.files)
	if err != nil {
		far.Close()
		return 0, err
	}
	d.mu.Lock()
	d.swtpm = p
	d.mu.Unlock()
	return f.add(far), nil
}

// ended clears up after a run of QEMU.
func (d *DPU) ended() {
	d.mu.Lock()
	ports, tpm := []*wire.Port{d.port, d.cable}, d.swtpm
	d.port, d.cable, d.swtpm = nil, nil, nil
	d.mu.Unlock()
	for _, p := range ports {
		if p != nil {
			p.Close()
		}
	}
	if tpm != nil {
		tpm.terminate(2 * time.Second) // it ends by itself when QEMU is gone
	}
	d.events.add(Event{At: time.Now(), Name: EventOff})
}

func (d *DPU) close() error {
	d.machine.off()
	d.ended() // what a start that failed has left
	d.redfish.release()
	return d.log.Close()
}

// boot switches the DPU on and waits until its Redfish service answers.
func (d *DPU) boot(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, bootTime, fmt.Errorf("nothing after %v", bootTime))
	defer cancel()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	console, mark, eventMark := d.machine.console, d.machine.console.Mark(), d.events.mark()
	began := time.Now()
	d.mu.Lock()
	d.started, d.poweredOn = mark, began
	d.mu.Unlock()
	if err := d.machine.on(ctx); err != nil {
		return err
	}
	go func() {
		if d.Slots != nil {
			return // after a panic the other slot is started
		}
		if l, err := console.Wait(ctx, mark, dpuTrouble); err == nil {
			fail(errors.New(l.Text))
		}
	}()
	go func() {
		if _, err := d.events.wait(ctx, eventMark, func(e Event) bool { return e.Name == EventOff }); err == nil {
			fail(errors.New("QEMU has ended"))
		}
	}()
	l, err := console.Wait(ctx, mark, serviceLine)
	if err != nil {
		return d.machine.bootError("its Redfish service", err)
	}
	d.Fingerprint = serviceLine.FindStringSubmatch(l.Text)[1]
	// The password, if it is still the initial one, was printed before.
	for _, l := range console.Since(mark) {
		if m := initialLine.FindStringSubmatch(l.Text); m != nil {
			d.User, d.Password, d.InitialPassword = m[1], m[2], m[2]
		}
	}
	for {
		err := d.hello(ctx)
		if err == nil {
			d.BootTook = time.Since(began)
			return nil
		}
		select {
		case <-ctx.Done():
			return d.machine.bootError("an answer of its Redfish service", errors.Join(context.Cause(ctx), err))
		case <-time.After(20 * time.Millisecond): // the forwarded port has no event for "somebody listens now"
		}
	}
}

// hello asks for the service root and keeps the certificate.
func (d *DPU) hello(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, d.URL+"/redfish/v1/", nil)
	if err != nil {
		return err
	}
	c := d.Client()
	defer c.CloseIdleConnections()
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET /redfish/v1/: %s", resp.Status)
	}
	d.CA = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: resp.TLS.PeerCertificates[0].Raw})
	return nil
}

// setPassword replaces the initial password by a random one.
func (d *DPU) setPassword(ctx context.Context) error {
	c, err := d.Redfish()
	if err != nil {
		return err
	}
	to := rand.Text()
	if err := c.ChangePassword(ctx, to); err != nil {
		return d.machine.bootError("the change of its initial password", err)
	}
	d.Password = to // and the service has ended the session
	return nil
}

// Pin keeps the DPU on these CPUs of this machine until it is switched off; none frees it again.
func (d *DPU) Pin(cpus ...int) error { return d.machine.pin(cpus) }

// Split keeps the DPU's processor on one of this machine's CPUs, and its devices, which a real one has beside it, on another, where they go
// before other work if this program may give them that. Pin ends that.
func (d *DPU) Split(ctx context.Context, processor, devices int) error {
	return d.machine.split(ctx, processor, devices)
}

// Scheduled tells how long the DPU's emulator has run so far, and how long it was ready and waited for a CPU of this machine.
func (d *DPU) Scheduled() (ran, waited time.Duration, err error) { return d.machine.scheduled() }

// KillAgent kills the process that does the agent's work, which its keeper then starts again: the kernel's magic sysrq on the console
// ends the largest process.
func (d *DPU) KillAgent(ctx context.Context) error {
	if err := d.QMP(ctx, "chardev-send-break", map[string]string{"id": "console"}, nil); err != nil {
		return err
	}
	_, err := d.machine.console.Write([]byte("f"))
	return err
}

// Redfish returns a client of the DPU's Redfish service that trusts exactly the DPU's certificate.
func (d *DPU) Redfish() (*client.Client, error) {
	return client.New(client.Config{URL: d.URL, User: d.User, Password: d.Password, Fingerprint: d.Fingerprint})
}

// Client returns an HTTP client that trusts exactly the DPU's certificate. It sends no credential.
func (d *DPU) Client() *http.Client {
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{
		MinVersion: tls.VersionTLS12,
		// Verification is not skipped but replaced: by the exact certificate that the console has printed.
		InsecureSkipVerify: true,
		VerifyPeerCertificate: func(certs [][]byte, _ [][]*x509.Certificate) error {
			if sum := sha256.Sum256(certs[0]); hex.EncodeToString(sum[:]) != d.Fingerprint {
				return fmt.Errorf("the certificate has SHA-256 %x, not the one that the console has printed", sum)
			}
			return nil
		},
	}}}
}

// Console is the DPU's serial port.
func (d *DPU) Console() *Console { return d.machine.console }

// A Step is a part of the DPU's start as its agent tells it.
type Step struct {
	Name     string
	Took, At time.Duration // At is when it ended, since the start of the DPU's kernel
}

var stepLine = regexp.MustCompile(`msg=(?:boot|start) step=(?:"([^"]+)"|(\S+)) (?:outcome=\S+ )?took=(\S+) at=(\S+)`)

// Started is when the DPU was switched on.
func (d *DPU) Started() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.poweredOn
}

// StartMark is the console's mark of before the DPU was switched on.
func (d *DPU) StartMark() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.started
}

// StartSteps are the steps of the DPU's latest start so far, without those that took no time; some go on at the same time.
func (d *DPU) StartSteps() []Step {
	var all []Step
	for _, l := range d.machine.console.Since(d.StartMark()) {
		m := stepLine.FindStringSubmatch(l.Text)
		if m == nil {
			continue
		}
		s := Step{Name: m[1] + m[2]}
		var err1, err2 error
		s.Took, err1 = time.ParseDuration(m[3])
		s.At, err2 = time.ParseDuration(m[4])
		if err1 == nil && err2 == nil && s.Took >= 10*time.Millisecond {
			all = append(all, s)
		}
	}
	return all
}

// Restart cuts the DPU's power, gives it back and waits for its Redfish service. Its disk and TPM keep their state.
func (d *DPU) Restart(ctx context.Context) error {
	d.machine.off()
	return d.boot(ctx)
}

// QMP runs a QMP command on the DPU's QEMU; args and result may be nil.
func (d *DPU) QMP(ctx context.Context, command string, args, result any) error {
	return d.machine.execute(ctx, command, args, result)
}

// WirePort is the DPU's port on the wire; nil while it is off.
func (d *DPU) WirePort() *wire.Port {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.port
}

// PowerOn switches the DPU on and waits for nothing.
func (d *DPU) PowerOn(ctx context.Context) error { return d.machine.on(ctx) }

// PowerOff cuts the DPU's power; it is no error if it is off.
func (d *DPU) PowerOff() { d.machine.off() }

// WriteState replaces files of the DPU's state disk, by their names in its root. The DPU must be off.
func (d *DPU) WriteState(files map[string][]byte) error {
	dir, err := os.MkdirTemp(filepath.Dir(d.StateDir), "write-")
	if err != nil {
		return &InfraError{Op: "write the DPU's state disk", Err: err}
	}
	defer os.RemoveAll(dir)
	for name, data := range files {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, data, 0o600); err != nil {
			return &InfraError{Op: "write the DPU's state disk", Err: err}
		}
		for _, command := range []string{"rm " + name, "write " + file + " " + name, "sif " + name + " mode 0100600"} {
			if err := d.debugfs("-w", "-R", command, d.disk); err != nil {
				return err
			}
		}
		// debugfs complains in words, not by its exit code.
		if got, err := d.ReadState(name); err != nil || !bytes.Equal(got, data) {
			return &InfraError{Op: "write the DPU's state disk", Err: fmt.Errorf("%s is not there afterwards: %w", name, err)}
		}
	}
	return nil
}

// ReadState returns a file of the DPU's state disk, e.g. "journal". The DPU must be off.
func (d *DPU) ReadState(name string) ([]byte, error) {
	dir, err := os.MkdirTemp(filepath.Dir(d.StateDir), "read-")
	if err != nil {
		return nil, &InfraError{Op: "read the DPU's state disk", Err: err}
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "file")
	if err := d.debugfs("-R", "dump "+name+" "+file, d.disk); err != nil {
		return nil, err
	}
	return os.ReadFile(file)
}

// debugfs works on the state disk as it is after its file system has been mounted once more: with its journal replayed.
func (d *DPU) debugfs(args ...string) error {
	if d.machine.current() != nil {
		return errors.New("the DPU is on: its state disk must be left alone")
	}
	for _, run := range [][]string{{"e2fsck", "-f", "-p", d.disk}, append([]string{"debugfs"}, args...)} {
		program, err := find(run[0])
		if err != nil {
			return err
		}
		out, err := exec.Command(program, run[1:]...).CombinedOutput()
		var exit *exec.ExitError
		if errors.As(err, &exit) && run[0] == "e2fsck" && exit.ExitCode() == 1 {
			err = nil // it has replayed the journal, or cleared what a power cut left
		}
		if err != nil {
			return &InfraError{Op: "look into the DPU's state disk", Err: fmt.Errorf("%s: %w: %s", run[0], err, out)}
		}
	}
	return nil
}

// Announced returns when the agent began to say on the DPU's console that it has found what the title tells, by the harness's clock: the DPU's own is
// another one.
func (d *DPU) Announced(ctx context.Context, mark int, title string) (time.Time, error) {
	line, err := d.Console().Wait(ctx, mark, regexp.MustCompile(`type=finding .*`+regexp.QuoteMeta(strings.Trim(strconv.Quote(title), `"`))))
	return line.Began, err
}
