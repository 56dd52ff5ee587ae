// Testinit stands for the agent in tests that boot an image: it brings the machine up, says over the console how that
// went, and ends the machine in the way that its argument asks for.
//
// Synopsis:
//
//	testinit [reboot|poweroff|hang]
//
// The report is one line: "TESTINIT " and a [Report] in JSON. With hang it stops feeding the watchdog and waits for its
// bite.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/backdoor-rhs/backdoor/boot"
)

// A Report is what the test reads from the console.
type Report struct {
	Uptime     float64 // seconds since the kernel's start, at main
	UpTook     float64 // seconds in boot.Up
	InImage    bool
	Steps      []boot.Step
	Persistent bool
	Boots      int // how often the state disk has seen us, this time included
	Addresses  []string
	Modules    []string
	Mounts     string
	Error      string
}

func main() {
	os.Exit(run(context.Background(), os.Args[1:]))
}

func run(ctx context.Context, args []string) int {
	r := Report{Uptime: uptime(), InImage: boot.InImage()}
	m, err := boot.Up(ctx, boot.Options{
		Logger: slog.New(slog.NewTextHandler(os.Stdout, nil)),
		Configure: func(dir string) (boot.Config, error) {
			var c boot.Config
			b, err := os.ReadFile(filepath.Join(dir, "boot.json"))
			if errors.Is(err, os.ErrNotExist) {
				return c, nil
			}
			if err == nil {
				err = json.Unmarshal(b, &c)
			}
			return c, err
		},
	})
	if err != nil {
		fmt.Println("TESTINIT", err)
		return 1
	}
	r.UpTook = uptime() - r.Uptime
	<-m.Settled()
	r.Steps, r.Persistent = m.Report(), m.Persistent()
	r.Boots, err = count(filepath.Join(boot.StateDir, "boots"))
	if err != nil {
		r.Error = err.Error()
	}
	if addrs, err := net.InterfaceAddrs(); err == nil {
		for _, a := range addrs {
			r.Addresses = append(r.Addresses, a.String())
		}
	}
	mods, _ := os.ReadFile("/proc/modules")
	for line := range strings.Lines(string(mods)) {
		name, _, _ := strings.Cut(line, " ")
		r.Modules = append(r.Modules, name)
	}
	mounts, _ := os.ReadFile("/proc/mounts")
	r.Mounts = string(mounts)
	b, err := json.Marshal(r)
	if err != nil {
		return 1
	}
	// Straight to the console: standard output goes through u-root's init, which may be late when the machine ends.
	if err := os.WriteFile("/dev/console", append(append([]byte("TESTINIT "), b...), '\n'), 0); err != nil {
		fmt.Println("testinit:", err)
	}
	verb := "poweroff"
	if len(args) > 0 {
		verb = args[0]
	}
	switch verb {
	case "reboot":
		err = m.Reboot()
	case "hang":
		m.FeedWhile(func() error { return errors.New("the test wants the watchdog to bite") })
		select {}
	default:
		err = m.PowerOff()
	}
	fmt.Println("testinit:", err)
	return 1
}

func uptime() float64 {
	b, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return -1
	}
	s, _, _ := strings.Cut(string(b), " ")
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return -1
	}
	return f
}

// count adds one to the number in a file.
func count(file string) (int, error) {
	b, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, err
	}
	n := 0
	if len(b) > 0 {
		if n, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
			return 0, err
		}
	}
	n++
	f, err := os.Create(file)
	if err != nil {
		return 0, err
	}
	_, err = fmt.Fprintln(f, n)
	return n, errors.Join(err, f.Sync(), f.Close())
}
