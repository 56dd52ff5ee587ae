// Backdoor-agree is the host's part in an access agreement: a small static program that is run on the host once, when it is set up.
//
//	backdoor-agree draft.json             show what the draft permits, ask, and sign it for the host; owner and monitors sign it then
//	backdoor-agree -mailbox signed.json   hold the signed document where an agent finds it that holds none yet
//
// It makes a key, signs, and forgets the key. From the moment at which the agent has locked the agreement nothing on the host changes it: the
// agent looks for mailboxes no more, and takes orders from its owner and its monitors only. "backdoor agree" is the same.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/backdoor-rhs/backdoor/cmd/internal/agree"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := agree.Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
