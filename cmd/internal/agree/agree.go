// Package agree is the host's part in an access agreement, once, when the host is set up.
//
// The host makes a key, signs the document with it and forgets it: it can sign nothing else afterwards, and the agent takes no word of the
// host's in any case. It is told what the document permits, and refuses one that is about another machine.
package agree

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/access"
	"github.com/backdoor-rhs/backdoor/internal/durable"
)

const usage = `Usage: backdoor-agree [flags] FILE

The host's part in an access agreement, run on the host when it is set up.

  backdoor-agree draft.json             show what the draft permits, ask, and sign it for the host; owner and monitors sign it then
  backdoor-agree -mailbox signed.json   hold the signed document where an agent finds it that holds none yet
`

// Options are the flags.
type Options struct {
	Yes     bool          // do not ask
	Mailbox bool          // hold a document for the agent
	For     time.Duration // how long a mailbox stays
	UUID    string        // file with the machine's system UUID
}

func (o *Options) flags(fs *flag.FlagSet) {
	fs.BoolVar(&o.Yes, "y", false, "sign without asking")
	fs.BoolVar(&o.Mailbox, "mailbox", false, "hold the signed document in memory, where the agent finds it")
	fs.DurationVar(&o.For, "for", 10*time.Minute, "how `long` the mailbox stays")
	fs.StringVar(&o.UUID, "uuid-file", "/sys/class/dmi/id/product_uuid", "`file` with the machine's SMBIOS system UUID")
}

// ErrDeclined is of a person who has not said yes.
var ErrDeclined = errors.New("not signed: it was declined")

// Run signs the document in a file for this host, or holds it for the agent.
func Run(ctx context.Context, o Options, file string, stdin io.Reader, stdout io.Writer) error {
	raw, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("read the agreement: %w", err)
	}
	a, err := access.Parse(bytes.NewReader(raw))
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if err := ours(a, o.UUID); err != nil {
		return err
	}
	if o.Mailbox {
		if missing := a.Unsigned(); len(missing) > 0 {
			return fmt.Errorf("%s lacks the signature of %s; no agent takes it", file, strings.Join(missing, ", "))
		}
		return hold(ctx, raw, o.For, stdout)
	}
	if len(a.Signatures)+len(a.Endorsements) > 0 || a.Host.Key != nil {
		return fmt.Errorf("%s is signed already; the host signs first: make a new one", file)
	}
	if err := a.WriteText(stdout); err != nil {
		return err
	}
	if !o.Yes {
		fmt.Fprint(stdout, "\nMay the monitors do this to this machine, until then? It cannot be taken back here. Type yes: ")
		line, err := bufio.NewReader(io.LimitReader(stdin, 100)).ReadString('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("read the answer: %w", err)
		}
		if strings.TrimSpace(line) != "yes" {
			return ErrDeclined
		}
	}
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return fmt.Errorf("make the host's key: %w", err)
	}
	a.Host.Key = access.Key(public)
	err = a.Sign(private)
	clear(private)
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(a, "", "  ")
	if err == nil {
		err = durable.WriteFile(file, append(b, '\n'), 0o644)
	}
	if err != nil {
		return fmt.Errorf("write the agreement: %w", err)
	}
	_, err = fmt.Fprintf(stdout, "Signed %s for the host; its key is gone.\n", file)
	return err
}

// ours refuses an agreement about another machine.
func ours(a *access.Agreement, file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("this machine's system UUID (is this root?): %w", err)
	}
	if uuid := strings.ToLower(strings.TrimSpace(string(b))); uuid != a.Host.UUID {
		return fmt.Errorf("the agreement is about host %s, and this machine is %.64q", a.Host.UUID, uuid)
	}
	return nil
}
