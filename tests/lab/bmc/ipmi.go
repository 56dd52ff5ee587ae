package bmc

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// IPMI is OpenIPMI's simulator of a BMC, ipmi_sim, speaking IPMI 2.0 over LAN+, whose chassis control is a Machine.
// Cipher suite 3 works; the simulator lacks 17 and the diagnostic interrupt.
type IPMI struct {
	Address        string // 127.0.0.1:port, UDP
	User, Password string

	machine Machine
	control net.Listener
	cmd     *exec.Cmd
	out     *os.File
	orders  sync.WaitGroup
}

// ErrNoSimulator means that ipmi_sim is not installed (Debian: openipmi).
var ErrNoSimulator = errors.New("ipmi_sim is not installed")

// StartIPMI runs the simulator for a machine until Close. Dir, which must exist, keeps its files and its log.
func StartIPMI(ctx context.Context, m Machine, dir string) (*IPMI, error) {
	program, err := exec.LookPath("ipmi_sim")
	if err != nil {
		return nil, fmt.Errorf("start ipmi_sim: %w: %w", ErrNoSimulator, err)
	}
	port, err := freePort()
	if err != nil {
		return nil, fmt.Errorf("start ipmi_sim: %w", err)
	}
	s := &IPMI{Address: fmt.Sprintf("127.0.0.1:%d", port), User: "admin", Password: "hunter2", machine: m}
	if s.control, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return nil, fmt.Errorf("start ipmi_sim: %w", err)
	}
	files := map[string]string{
		"lan.conf": fmt.Sprintf(lanConf, port, filepath.Join(dir, "chassis.sh"), s.User, s.Password),
		"sim.emu":  emulator,
		// The simulator runs this for each order: "ADDRESS get power", "ADDRESS set power 1 …".
		"chassis.sh": fmt.Sprintf("#!/bin/bash\nexec 3<>/dev/tcp/127.0.0.1/%d || exit 1\necho \"$*\" >&3\nread -r code text <&3\n[ -n \"$text\" ] && echo \"$text\"\nexit \"$code\"\n",
			s.control.Addr().(*net.TCPAddr).Port),
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
			s.control.Close()
			return nil, fmt.Errorf("start ipmi_sim: %w", err)
		}
	}
	if s.out, err = os.Create(filepath.Join(dir, "ipmi_sim.log")); err != nil {
		s.control.Close()
		return nil, fmt.Errorf("start ipmi_sim: %w", err)
	}
	s.cmd = exec.Command(program, "-c", filepath.Join(dir, "lan.conf"), "-f", filepath.Join(dir, "sim.emu"), "-s", dir, "-n")
	s.cmd.Dir, s.cmd.Stdout, s.cmd.Stderr = dir, s.out, s.out
	s.orders.Go(s.serve)
	if err := s.cmd.Start(); err != nil {
		s.cmd = nil
		return nil, errors.Join(fmt.Errorf("start ipmi_sim: %w", err), s.Close())
	}
	if err := s.await(ctx); err != nil {
		log, _ := os.ReadFile(s.out.Name())
		return nil, errors.Join(fmt.Errorf("start ipmi_sim: %w: it says %q", err, log), s.Close())
	}
	return s, nil
}

// The configuration of ipmi_sim: a LAN+ interface with one administrator, and a chassis whose power is the machine's.
const (
	lanConf = `name "labbmc"
set_working_mc 0x20
  startlan 1
    addr 127.0.0.1 %d
    priv_limit admin
    allowed_auths_callback none md2 md5 straight
    allowed_auths_user none md2 md5 straight
    allowed_auths_operator none md2 md5 straight
    allowed_auths_admin none md2 md5 straight
    guid a123456789abcdefa123456789abcdef
  endlan
  chassis_control "%s 0x20"
  user 1 false "" "test" user 10 none md2 md5 straight
  user 2 true "%s" "%s" admin 10 none md2 md5 straight
`
	emulator = `mc_setbmc 0x20
mc_add 0x20 0 no-device-sdrs 0x23 9 8 0x9f 0x1291 0xf02 persist_sdr
sel_enable 0x20 1000 0x0a
mc_enable 0x20
`
)

// freePort returns a UDP port that nobody has at this moment; ipmi_sim cannot choose one itself.
func freePort() (int, error) {
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).Port, nil
}

// ping is an RMCP presence ping (ASF 2.0, section 3.2.4.2).
var ping = []byte{6, 0, 0xff, 6, 0, 0, 0x11, 0xbe, 0x80, 0, 0, 0}

// await returns when the simulator answers.
func (s *IPMI) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := net.Dial("udp", s.Address)
	if err != nil {
		return err
	}
	defer conn.Close()
	for buf := make([]byte, 64); ; {
		// Until it listens, writes and reads are refused.
		_, werr := conn.Write(ping)
		if err := conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			return err
		}
		_, rerr := conn.Read(buf)
		if werr == nil && rerr == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no answer on %s: %w", s.Address, errors.Join(werr, rerr))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// serve answers the orders that chassis.sh brings.
func (s *IPMI) serve() {
	for {
		conn, err := s.control.Accept()
		if err != nil {
			return
		}
		s.orders.Go(func() {
			defer conn.Close()
			line, err := bufio.NewReader(conn).ReadString('\n')
			if err != nil {
				return
			}
			answer, err := s.do(strings.Fields(line))
			if err != nil {
				fmt.Fprintf(conn, "1 %v\n", err)
				return
			}
			fmt.Fprintf(conn, "0 %s\n", answer)
		})
	}
}

// do carries out "ADDRESS get|set NAME VALUE …".
func (s *IPMI) do(words []string) (string, error) {
	if len(words) < 3 {
		return "", fmt.Errorf("order %q is too short", words)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	verb, args := words[1], words[2:]
	if verb == "get" {
		switch args[0] {
		case "power":
			if s.machine.Powered() {
				return "power:1", nil
			}
			return "power:0", nil
		case "boot":
			return "boot:default", nil
		}
		return "", fmt.Errorf("%q is unknown", args[0])
	}
	for len(args) >= 2 {
		var err error
		switch name, value := args[0], args[1]; name + " " + value {
		case "power 1":
			err = s.machine.PowerOn(ctx)
		case "power 0":
			err = s.machine.PowerOff(ctx)
		case "reset 1":
			err = s.machine.Reset(ctx)
		case "shutdown 1":
			err = s.machine.Shutdown(ctx)
		default:
			err = fmt.Errorf("%s %s: %w", name, value, errors.ErrUnsupported)
		}
		if err != nil {
			return "", err
		}
		args = args[2:]
	}
	return "", nil
}

// Close ends the simulator; the machine stays as it is.
func (s *IPMI) Close() error {
	var errs []error
	if s.cmd != nil {
		errs = append(errs, s.cmd.Process.Kill())
		_ = s.cmd.Wait() // it was killed, and says so
	}
	errs = append(errs, s.control.Close(), s.out.Close())
	s.orders.Wait()
	return errors.Join(errs...)
}
