//go:build amd64

// Counted is the first program of a guest that counts its own instructions: under QEMU's -icount shift=0 the time stamp counter counts
// one for each. It does the same work in spans, tells the counter at the end of each on the console, and switches the machine off.
//
// With counted.agent=1 on the kernel's command line it has an agent on the machine itself beside it, which looks at the state of the
// machine ten times a second: what no observation from outside may cost. With counted.wall=1 it measures by the clock instead; see wall. With counted.victim=1
// a process that does nothing but run competes with it: what a repair may kill.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// tsc is RDTSC, behind a mark for who counts the instructions from outside.
func tsc() uint64

const (
	spans = 4
	work  = 6 << 20 // steps of a span
)

var table [1 << 17]uint64

func main() {
	if len(os.Args) > 1 { // the victim: it does nothing but run
		for x := 0; ; x++ {
		}
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		fmt.Println("counted:", err)
	}
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		fmt.Println("counted:", err)
	}
	if strings.Contains(string(line), "counted.agent=1") {
		go func() {
			for {
				os.ReadFile("/proc/meminfo") // what it says is of no interest here
				time.Sleep(100 * time.Millisecond)
			}
		}()
	}
	if strings.Contains(string(line), "counted.wall=1") {
		wall()
		return
	}
	steps := work
	if strings.Contains(string(line), "counted.victim=1") {
		steps *= 4                     // for the time that the agent needs
		signal.Ignore(syscall.SIGCHLD) // the kernel buries the victim
		if _, err := syscall.ForkExec("/init", []string{"/init", "victim"}, &syscall.ProcAttr{Files: []uintptr{0, 1, 2}}); err != nil {
			fmt.Println("counted:", err)
		}
	}
	var marks [spans + 1]uint64
	marks[0] = tsc()
	x := uint64(88172645463325252)
	for i := range spans {
		for n := range steps {
			x ^= x << 13
			x ^= x >> 7
			x ^= x << 17
			table[x%uint64(len(table))] += x
			if n%4096 == 0 {
				unix.Getppid()
			}
		}
		marks[i+1] = tsc()
	}
	for i, m := range marks {
		fmt.Printf("counted: mark %d at %d\n", i, m)
	}
	fmt.Printf("counted: end, %x\n", table[7])
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Println("counted:", err)
	}
}
