package forward

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/images/initramfs"
	"github.com/backdoor-rhs/backdoor/images/kernels"
	"github.com/backdoor-rhs/backdoor/images/modpack"
)

const (
	kernel  = "6.1-cloud-arm64" // as the DPU's
	flows   = 8
	payload = 'f' // of each frame that is counted
	span    = 400 * time.Millisecond
	rounds  = 15 // of each way, alternating: many and short, so that what else the computer does meets all ways alike
)

// guest is a machine that forwards between two sockets.
type guest struct {
	in, out *os.File // our ends of eth0's and eth1's wires
	console io.WriteCloser
	lines   *bufio.Scanner
	said    []string
}

// start boots the guest and waits until its cards are there. It ends with the benchmark.
func start(b *testing.B) *guest {
	b.Helper()
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	target, err := kernels.Lookup(kernel)
	must(err)
	k, err := kernels.Fetch(b.Context(), "", target)
	must(err)
	dir := b.TempDir()
	program := filepath.Join(dir, "guest")
	build := exec.CommandContext(b.Context(), "go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, "./guest")
	build.Env = append(os.Environ(), "GOOS=linux", "GOARCH=arm64", "CGO_ENABLED=0")
	if text, err := build.CombinedOutput(); err != nil {
		b.Fatalf("build the guest: %v: %s", err, text)
	}
	init, err := os.ReadFile(program)
	must(err)
	mods, err := modpack.Make(k.ModulesDir, []string{"virtio_pci", "virtio_net", "bridge"})
	must(err)
	var a initramfs.Archive
	for _, d := range []string{"dev", "proc", "sys", "modules"} {
		a.Directory(d, 0o755)
	}
	a.CharDevice("dev/console", 0o600, 5, 1)
	a.File("init", init, 0o755)
	for i, m := range mods.LoadOrder() {
		a.File(fmt.Sprintf("modules/%02d-%s.ko", i, m.Name), m.Data, 0o644)
	}
	archive, err := a.Bytes()
	must(err)
	initrd := filepath.Join(dir, "initramfs")
	must(os.WriteFile(initrd, archive, 0o644))

	g := &guest{}
	q := exec.Command("qemu-system-aarch64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "virt", "-cpu", "cortex-a57",
		"-accel", "tcg", "-m", "512", "-smp", "1", "-serial", "stdio", "-kernel", k.Vmlinuz, "-initrd", initrd, "-append", "console=ttyAMA0 quiet panic=-1")
	for i, ours := range []**os.File{&g.in, &g.out} {
		fd, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		must(err)
		*ours = os.NewFile(uintptr(fd[0]), "wire")
		far := os.NewFile(uintptr(fd[1]), "far")
		defer far.Close()
		b.Cleanup(func() { (*ours).Close() })
		q.ExtraFiles = append(q.ExtraFiles, far)
		// A wire of datagrams offers no offload whatever.
		q.Args = append(q.Args, "-netdev", fmt.Sprintf("dgram,id=n%d,local.type=fd,local.str=%d", i, 3+i), "-device", fmt.Sprintf("virtio-net-pci,netdev=n%d,romfile=,mac=02:00:00:00:00:1%d", i, i))
	}
	q.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	g.console, err = q.StdinPipe()
	must(err)
	out, err := q.StdoutPipe()
	must(err)
	g.lines = bufio.NewScanner(out)
	q.Stderr = os.Stderr
	runtime.LockOSThread() // Pdeathsig is of this thread
	must(q.Start())
	b.Cleanup(func() { q.Process.Kill(); q.Wait() })
	if _, err := g.answer(b.Context()); err != nil {
		b.Fatal(err)
	}
	return g
}

// answer waits for what the guest says next.
func (g *guest) answer(ctx context.Context) (string, error) {
	type line struct {
		text string
		err  error
	}
	got := make(chan line, 1)
	go func() {
		for g.lines.Scan() {
			g.said = append(g.said, g.lines.Text())
			if text, ok := strings.CutPrefix(strings.TrimSpace(g.lines.Text()), "forward: "); ok {
				if why, bad := strings.CutPrefix(text, "error: "); bad {
					got <- line{err: errors.New(why)}
				} else {
					got <- line{text: text}
				}
				return
			}
		}
		got <- line{err: fmt.Errorf("the guest has ended: %w: %q", io.ErrUnexpectedEOF, g.said)}
	}()
	select {
	case l := <-got:
		return l.text, l.err
	case <-time.After(2 * time.Minute):
		return "", errors.New("the guest says nothing for two minutes")
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// forward has the guest forward in one of its ways.
func (g *guest) forward(ctx context.Context, how string) (string, error) {
	if _, err := fmt.Fprintln(g.console, how); err != nil {
		return "", err
	}
	return g.answer(ctx)
}

// frame is a UDP datagram over IPv4 with our mark, of a flow.
func frame(size, flow int) []byte {
	f := make([]byte, size)
	copy(f, "\x02\x00\x00\x00\x00\x02\x02\x00\x00\x00\x00\x01\x08\x00\x45")
	ip, udp := f[14:], f[34:]
	binary.BigEndian.PutUint16(ip[2:], uint16(size-14))
	ip[8], ip[9] = 64, unix.IPPROTO_UDP
	copy(ip[12:], []byte{10, 9, 0, 1, 10, 9, 0, 2})
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum+sum>>16))
	binary.BigEndian.PutUint16(udp, uint16(7000+flow))
	binary.BigEndian.PutUint16(udp[2:], 9)
	binary.BigEndian.PutUint16(udp[4:], uint16(size-34))
	for i := 42; i < size; i++ {
		f[i] = payload
	}
	return f
}

// measure sends frames of a size for a span, as fast as the wire takes them, and returns how many a second came out and how many went in.
func (g *guest) measure(size int) (out, in float64, err error) {
	var all [flows][]byte
	for i := range all {
		all[i] = frame(size, i)
	}
	var sent, got atomic.Uint64
	stop := make(chan struct{})
	sending, receiving := make(chan error, 1), make(chan error, 1)
	rx := int(g.out.Fd())
	if err := unix.SetsockoptTimeval(rx, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 200000}); err != nil {
		return 0, 0, err
	}
	go func() {
		buf := make([]byte, 2048)
		for {
			n, err := unix.Read(rx, buf)
			switch {
			case err == unix.EAGAIN:
				select {
				case <-stop:
					receiving <- nil
					return
				default:
				}
			case err == unix.EINTR:
			case err != nil:
				receiving <- err
				return
			case n == size && buf[n-1] == payload:
				got.Add(1)
			}
		}
	}()
	tx := int(g.in.Fd())
	done := make(chan struct{})
	go func() {
		for n := 0; ; n++ {
			select {
			case <-done:
				sending <- nil
				return
			default:
			}
			if _, err := unix.Write(tx, all[n%flows]); err != nil && err != unix.EINTR && err != unix.ENOBUFS {
				sending <- err
				return
			}
			sent.Add(1)
		}
	}()
	time.Sleep(span / 5) // the pipe fills
	began, s0, g0 := time.Now(), sent.Load(), got.Load()
	time.Sleep(span)
	took := time.Since(began).Seconds()
	in, out = float64(sent.Load()-s0)/took, float64(got.Load()-g0)/took
	close(done)
	err = <-sending
	close(stop)
	return out, in, errors.Join(err, <-receiving)
}

// BenchmarkForwarding compares the ways in the same guest, alternating. The figures are frames a second that came out, the median of the
// rounds; x is the ratio of the packet path's to the bridge's, round by round: its median and its quartiles. "unyielding" is the packet path without the
// threads by which it gives way to the agent: what those cost.
func BenchmarkForwarding(b *testing.B) {
	g := start(b)
	ways := []string{"packetpath", "bridge", "unyielding"}
	for _, size := range []int{60, 512, 1514} {
		b.Run(fmt.Sprintf("%dB", size), func(b *testing.B) {
			rates, lost, ratios := map[string][]float64{}, map[string][]float64{}, []float64{}
			for b.Loop() {
				for round := range rounds {
					for i := range ways {
						way := ways[(i+round)%len(ways)]
						how, err := g.forward(b.Context(), way)
						if err != nil {
							b.Fatal(err)
						}
						if round == 0 && way == "packetpath" {
							b.Log(how)
						}
						out, in, err := g.measure(size)
						if err != nil {
							b.Fatal(err)
						}
						if out == 0 {
							b.Fatalf("%s forwards nothing", how)
						}
						rates[way], lost[way] = append(rates[way], out), append(lost[way], 100*(1-out/in))
					}
					n := len(rates["bridge"]) - 1
					ratios = append(ratios, rates["packetpath"][n]/rates["bridge"][n])
				}
			}
			for _, way := range ways {
				b.ReportMetric(median(rates[way]), way+"-frames/s")
				b.ReportMetric(median(lost[way]), way+"-lost-%")
			}
			b.ReportMetric(median(ratios), "x")
			slices.Sort(ratios)
			b.ReportMetric(ratios[len(ratios)/4], "x-lower-quartile")
			b.ReportMetric(ratios[len(ratios)*3/4], "x-upper-quartile")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func median(all []float64) float64 {
	all = slices.Sorted(slices.Values(all))
	return all[len(all)/2]
}
