// Hostinit is the userland of the lab's host: the first process of a stock kernel, and the few services that make the
// host worth healing.
//
// It is built for the lab alone and goes into no product image. As process 1 it mounts what a userland needs, loads the
// modules that the lab packed, brings up the network, starts the services below, and serves the lab's control line
// (package control) on the second serial port. Under the names of its services it is one of them:
//
//	echod   the stateful TCP service on port 7007; see service.go
//	tickd   wakes ten times a second and does a little work
//
// The kernel's command line may have lab.bystanders=N to start N processes that only sleep; the default is 12.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"time"
)

func main() {
	switch filepath.Base(os.Args[0]) {
	case "echod":
		exit(serve())
	case "tickd":
		tick()
	}
	if os.Getpid() != 1 {
		exit(fmt.Errorf("%s is no service of the lab's host, and this is not process 1", os.Args[0]))
	}
	exit(boot()) // the lab reads the message on the console; the kernel panics, for the machine has not come up
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "hostinit:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// tick is a service that never has much to do and never stops.
func tick() {
	sum := uint64(0)
	for range time.Tick(100 * time.Millisecond) {
		for i := range uint64(10000) {
			sum = sum*31 + i
		}
		if sum == 0 {
			fmt.Fprintln(os.Stderr, "tickd: zero")
		}
	}
}
