package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// churn changes for ever what the kernel keeps lists of: processes, threads, sockets, files, mounts, control groups and modules.
func churn() {
	runtime.GOMAXPROCS(4)
	forever := func(f func(i int)) {
		go func() {
			for i := 0; ; i++ {
				f(i)
			}
		}()
	}
	forever(func(int) {
		c := exec.Command("/proc/self/exe", "zombie")
		if c.Start() == nil {
			c.Wait()
		}
	})
	forever(func(int) {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return
		}
		c, err := net.Dial("tcp4", l.Addr().String())
		if err == nil {
			fmt.Fprint(c, "x")
			c.Close()
		}
		l.Close()
	})
	forever(func(int) {
		p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			unix.Close(p[0])
			unix.Close(p[1])
		}
	})
	forever(func(i int) {
		name := fmt.Sprintf("/cgroup/churn%d", i)
		if os.Mkdir(name, 0o755) == nil {
			os.Remove(name)
		}
	})
	forever(func(int) {
		done := make(chan bool)
		go func() {
			runtime.LockOSThread() // and so the thread ends with it
			close(done)
		}()
		<-done
	})
	forever(func(i int) {
		name := fmt.Sprintf("/run/churn%d", i)
		if os.Mkdir(name, 0o755) == nil {
			if unix.Mount("churn", name, "tmpfs", 0, "") == nil {
				unix.Unmount(name, 0)
			}
			os.Remove(name)
		}
	})
	modules, _ := filepath.Glob("/modules/*-dummy.ko")
	if len(modules) == 1 {
		b, err := os.ReadFile(modules[0])
		forever(func(int) {
			if err == nil {
				unix.DeleteModule("dummy", 0)
				unix.InitModule(b, "numdummies=0")
			}
		})
	}
}
