// Backdoord is the agent: it watches a host through its physical memory, finds what is wrong, repairs what it is allowed to
// repair, and serves all of that over Redfish.
//
// # Synopsis
//
//	backdoord [-config FILE] [-check]
//
// # Description
//
// As the first program of an image (u-root's uinit) the agent brings the machine up first (package boot). Then, there and
// elsewhere, it starts itself a second time: the first process keeps the machine up, feeds the watchdog and restarts the
// second, which does the work, if that ends or stops answering.
//
// The configuration is one strict JSON file; package config describes it. Without one, or with one that is wrong, the agent
// still starts: read-only, watching nothing, with its Redfish service up, whose state says why. A part that fails is
// reported, logged and started again; the others go on.
//
// At its first start the service makes a certificate and a random password. Both are shown on the console: the password
// has to be changed at the first login, and the certificate's SHA-256 is what an operator compares with.
//
//	-config FILE  the configuration; default /var/lib/backdoor/config.json
//	-check        check the configuration and everything that it names, and exit
//	-version      print the version and exit
//
// # Exit status
//
// 0 after an orderly end (SIGTERM, SIGINT), 1 if the agent could not start at all or -check found a mistake, 2 for wrong usage.
//
// # Files
//
// In the state directory: config.json, journal (what was decided and written, hash-chained), the Redfish service's accounts,
// key and certificate, and hints for a faster attach. In types, if there: BTF for hosts whose kernels carry none, as ID.btf or RELEASE.btf
// by the kernel's build ID or release (see backdoor help types). In golden, if there: kernels as they were built, as ID.vmlinux (see
// backdoor help golden).
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
