package lab

import "os"

// routerStarts is how often the router is started before it is given up.
const routerStarts = 20

// startRouter plugs a router into the wire: QEMU's user network without a machine. HOST finds there what it finds on a user network
// of its own, and connections to its service come in there. It is started again when it ends: some frames that a host can forge end QEMU's user
// network, as they would a router.
func (l *Lab) startRouter(say func(format string, a ...any)) error {
	_, far, err := l.Wire.Socket("router")
	if err != nil {
		return &InfraError{Op: "plug the router into the wire", Err: err}
	}
	run := func() (*process, error) {
		return start("qemu-system-x86_64", []string{
			"-name", "backdoor-router", "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none",
			"-netdev", "user,id=net," + l.Host.forward(), "-netdev", "hubport,id=hub-net,hubid=0,netdev=net",
			"-netdev", "dgram,id=wire,local.type=fd,local.str=3", "-netdev", "hubport,id=hub-wire,hubid=0,netdev=wire",
		}, []*os.File{far})
	}
	p, err := run()
	if err != nil {
		far.Close()
		return err
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		defer far.Close()
		for n := 1; ; n++ {
			select {
			case <-stop:
				p.kill()
				return
			case <-p.done:
			}
			again := "it is started again"
			if n == routerStarts {
				again = "it is not started again"
			}
			say("the router has ended, %v (%s); %s", p.err, p.stderr, again)
			if n == routerStarts {
				return
			}
			next, err := run()
			if err != nil {
				say("start the router again: %v", err)
				return
			}
			p = next
		}
	}()
	l.closers = append(l.closers, func() error {
		close(stop)
		<-stopped
		return nil
	})
	return nil
}
