// Backdoor-loader is the first stage of a machine: it chooses the slot to start, verifies what is in it, measures it, and jumps.
//
// # Synopsis
//
//	backdoor-loader                      (as /init of its own initramfs; it takes no arguments)
//
// # Description
//
// The loader is the only program of the smallest u-root image: no shell, no network, nothing that listens. It stands for what a
// ROM or secure boot has verified. In order, with the hardware watchdog armed from the first step on:
//
//  1. mount proc, sys and dev, load the drivers of disk and TPM, arm the watchdog;
//  2. read the state of the slots (package slot) and the security epoch (the TPM's counter, package attest);
//  3. for each slot in the order that the state gives: verify its bundle's signature against the key sets in
//     /etc/backdoor/root.json, its machine class and epoch, copy kernel and initramfs into memory and verify them there, and
//     load them for kexec. What fails is noted in the state with the reason, and the next slot is tried;
//  4. count the start in the state, measure what was loaded into PCR 11, lock the epoch's counter, and jump.
//
// While the TPM's driver tests its chip, what will most likely be started is already verified and loaded.
//
// What it did is handed on in the started image's root directory (package handover): the event log, the slot, what was passed over
// and why. When nothing can be started it says so and resets the machine, which tries again.
//
// The security epoch in the TPM is raised here and nowhere else: to the one of the image that is about to be started, if that has
// proved itself and the slots' state has settled for it.
//
// # Files
//
// In the loader's initramfs: /etc/backdoor/root.json, the key sets that it trusts (bundle.Envelope, a list), and
// /etc/backdoor/loader.json: {"product": "backdoor", "machine": "dpu-arm64"}.
package main

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	err := run(os.Stdout)
	fmt.Printf("backdoor-loader: %v; resetting the machine\n", err)
	time.Sleep(3 * time.Second) // for the console, and against a loop that nobody could read
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	select {} // process 1 must not end; the watchdog is no longer fed
}
