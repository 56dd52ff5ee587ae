package lab

import "fmt"

// startRouter plugs a router into the wire: QEMU's user network without a machine. HOST finds there what it finds on a user network
// of its own, and connections to its service come in there.
func (l *Lab) startRouter() error {
	_, far, err := l.Wire.Socket("router")
	if err != nil {
		return &InfraError{Op: "plug the router into the wire", Err: err}
	}
	own := fds{}
	defer own.close()
	p, err := start("qemu-system-x86_64", []string{
		"-name", "backdoor-router", "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none",
		"-netdev", "user,id=net," + l.Host.forward(), "-netdev", "hubport,id=hub-net,hubid=0,netdev=net",
		"-netdev", fmt.Sprintf("dgram,id=wire,local.type=fd,local.str=%d", own.add(far)), "-netdev", "hubport,id=hub-wire,hubid=0,netdev=wire",
	}, own.files)
	if err != nil {
		return err
	}
	l.closers = append(l.closers, func() error {
		p.kill()
		return nil
	})
	return nil
}
