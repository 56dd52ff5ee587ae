package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/boot"
)

// The worker says "alive" every beatEvery; after beatLost without it, it is taken for hung and killed.
const (
	beatEvery = 2 * time.Second
	beatLost  = 60 * time.Second
)

// exitReboot is how a worker asks for a restart of the whole machine.
const exitReboot = 75

// keeper is the first process: it keeps a worker running.
type keeper struct {
	path           string
	log            *slog.Logger
	stdout, stderr io.Writer
	machine        *boot.Machine // nil when the machine is not ours

	lastBeat atomic.Int64 // UnixNano
}

// alive tells the watchdog's feeder whether the agent does its work.
func (k *keeper) alive() error {
	if silent := time.Since(time.Unix(0, k.lastBeat.Load())); silent > 2*beatLost {
		return fmt.Errorf("no sign of life from the worker for %v", silent.Round(time.Second))
	}
	return nil
}

// run starts a worker, and another when it ends, ever more slowly if it ends at once.
func (k *keeper) run(ctx context.Context) int {
	k.lastBeat.Store(time.Now().UnixNano())
	delay := time.Second
	for {
		started := time.Now()
		err := k.worker(ctx)
		if ctx.Err() != nil {
			return 0
		}
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() == exitReboot && k.machine != nil {
			k.log.Info("restarting the machine, as asked for")
			err = k.machine.Reboot()
		}
		if time.Since(started) > time.Minute {
			delay = time.Second
		}
		k.log.Error("the worker has ended; starting another", "err", err, "in", delay)
		select {
		case <-ctx.Done():
			return 0
		case <-time.After(delay):
		}
		delay = min(2*delay, 30*time.Second)
	}
}

// worker runs one worker to its end.
func (k *keeper) worker(ctx context.Context) error {
	// Pdeathsig is sent when the thread that started the worker ends, so that thread has to stay.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own program: %w", err)
	}
	beats, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make pipe: %w", err)
	}
	defer beats.Close()
	devices, found, err := os.Pipe()
	if err != nil {
		w.Close()
		return fmt.Errorf("make pipe: %w", err)
	}
	go func() { // closed when the machine has all its devices
		if k.machine != nil {
			<-k.machine.Devices()
		}
		found.Close()
	}()
	args := []string{"-worker", "-config", k.path}
	if k.machine != nil {
		args = append(args, "-machine")
	}
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Stdout, cmd.Stderr = k.stdout, k.stderr
	cmd.ExtraFiles = []*os.File{w, devices} // file descriptors 3 and 4
	// The worker must not outlive its keeper, and a terminal's interrupt goes to the keeper alone.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	err = cmd.Start()
	w.Close()
	devices.Close()
	if err != nil {
		return fmt.Errorf("start worker: %w", err)
	}
	k.lastBeat.Store(time.Now().UnixNano())
	k.log.Info("worker started", "pid", cmd.Process.Pid)

	hung := time.AfterFunc(beatLost, func() {
		k.log.Error("the worker gives no sign of life; killing it", "pid", cmd.Process.Pid)
		if err := cmd.Process.Signal(syscall.SIGQUIT); err != nil { // its goroutines' stacks go to the log
			k.log.Warn("signal worker", "err", err)
		}
		time.AfterFunc(5*time.Second, func() { cmd.Process.Kill() })
	})
	defer hung.Stop()
	go func() {
		buf := make([]byte, 64)
		for {
			if _, err := beats.Read(buf); err != nil {
				return // the worker has ended
			}
			k.lastBeat.Store(time.Now().UnixNano())
			hung.Reset(beatLost)
		}
	}()
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("worker: %w", err)
	}
	return errors.New("worker ended without an error")
}

// keeperDevices returns a channel that is closed when the keeper has closed its end of file descriptor 4: the machine has all the
// devices then that it will have.
func keeperDevices() <-chan struct{} {
	found := make(chan struct{})
	var st unix.Stat_t
	if err := unix.Fstat(4, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		close(found) // nobody is to be waited for
		return found
	}
	f := os.NewFile(4, "devices")
	go func() {
		defer close(found)
		defer f.Close()
		_, _ = f.Read(make([]byte, 1)) // nothing is ever written
	}()
	return found
}

// beat says on file descriptor 3, while the agent's parts answer, that they do. It returns when ctx ends.
func beat(ctx context.Context, answers func(context.Context) error, log *slog.Logger) {
	f := os.NewFile(3, "beat")
	if f == nil {
		return
	}
	if st, err := f.Stat(); err != nil || st.Mode()&os.ModeNamedPipe == 0 {
		return // started by hand
	}
	defer f.Close()
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for {
		if err := answers(ctx); err != nil {
			log.Warn("no sign of life is sent", "err", err)
		} else if _, err := f.Write([]byte{'.'}); err != nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
