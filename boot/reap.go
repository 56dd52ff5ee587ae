package boot

import (
	"context"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// reapOrphans collects dead processes that were left to process 1. A child that some goroutine waits for must not be
// taken from it, and is collected by it at once; so only what was already dead one scan earlier is reaped.
func reapOrphans(ctx context.Context) {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	dead := map[int]bool{}
	for {
		now := map[int]bool{}
		for _, pid := range zombies("/proc", os.Getpid()) {
			now[pid] = true
			if dead[pid] {
				var ws unix.WaitStatus
				_, _ = unix.Wait4(pid, &ws, unix.WNOHANG, nil) // ECHILD: someone else was faster
			}
		}
		dead = now
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// zombies returns the dead children of a process, from proc's stat files.
func zombies(proc string, parent int) []int {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile(proc + "/" + e.Name() + "/stat")
		if err != nil {
			continue
		}
		if state, ppid := parseStat(string(b)); state == "Z" && ppid == parent {
			pids = append(pids, pid)
		}
	}
	return pids
}

// parseStat returns state and parent from a line of proc_pid_stat(5); comm may hold spaces and parentheses.
func parseStat(s string) (state string, ppid int) {
	i := strings.LastIndexByte(s, ')')
	if i < 0 {
		return "", 0
	}
	f := strings.Fields(s[i+1:])
	if len(f) < 2 {
		return "", 0
	}
	ppid, err := strconv.Atoi(f[1])
	if err != nil {
		return "", 0
	}
	return f[0], ppid
}
