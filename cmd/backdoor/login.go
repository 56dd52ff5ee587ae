package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/url"
	"path/filepath"

	"github.com/backdoor-rhs/backdoor/redfish/client"
)

var loginVerb = verb{
	name:  "login",
	short: "log in to an agent and keep it as a context",
	long: `The agent is the one of -host URL, or of the context. What is kept under the context's name (-context; else the host's name)
is where the agent is, how its certificate is known, and the session's token; with -save-password also the password, so that an
ended session is renewed without asking.

An agent that has never been logged in to shows a random initial password on its console, and wants a new one: it is asked for
twice, or read from -new-password-file. With "-" for both files, the first line of standard input is the present password and
the second the new one. The console also shows the SHA-256 of the agent's certificate: give it with -fingerprint.

  backdoor login -host https://10.0.0.5 -context dpu1 -fingerprint 5d…7f
  printf '%s\n' "$old" "$new" | backdoor login -host https://10.0.0.5 -password-file - -new-password-file -`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.StringVar(&o.newPasswordFile, "new-password-file", "", "`file` with the password to set, - for standard input")
		fs.BoolVar(&o.savePassword, "save-password", false, "keep the password, too, not only the session")
	},
	run: runLogin,
}

func runLogin(ctx context.Context, e *env, args []string) (int, error) {
	if err := none("login", args); err != nil {
		return 0, err
	}
	path, err := e.contextsPath()
	if err != nil {
		return 0, err
	}
	all, err := readContexts(path)
	if err != nil {
		return 0, err
	}
	// -host with -context makes, or moves, the context of that name.
	name := e.o.context
	if e.o.host != "" {
		e.set["context"] = false
	}
	a, err := e.target()
	if err != nil {
		return 0, err
	}
	if name == "" {
		name = a.Name
	}
	if name == "" {
		if name, err = hostName(a.URL); err != nil {
			return 0, err
		}
	}
	known := a // for advice: it has a name only if there is such a context
	a.Name = name
	if a.User == "" {
		a.User = "admin"
	}
	a.Token, a.Session = "", ""

	password, err := e.password(a)
	if err != nil {
		return 0, err
	}
	c, err := e.client(a, password)
	if err != nil {
		return 0, err
	}
	err = c.Login(ctx)
	var change *client.PasswordChangeError
	switch {
	case errors.As(err, &change) || err == nil && e.o.newPasswordFile != "":
		if change != nil && e.o.newPasswordFile == "" {
			fmt.Fprintf(e.stderr, "This is the first login: the agent wants a new password for %s.\n", a.User)
		}
		if password, err = e.newPassword(a); err != nil {
			return 0, err
		}
		if err := c.ChangePassword(ctx, password); err != nil {
			return 0, e.explain(known, err)
		}
	case err != nil:
		return 0, e.explain(known, err)
	}
	a.Token, a.Session = c.Session()
	a.Password = ""
	if e.o.savePassword {
		a.Password, a.PasswordFile = password, ""
	} else if a.PasswordFile == "-" || change != nil || e.o.newPasswordFile != "" {
		a.PasswordFile = "" // it does not hold the password that counts now
	}
	for _, f := range []*string{&a.CAFile, &a.PasswordFile} {
		if *f != "" {
			if *f, err = filepath.Abs(*f); err != nil {
				return 0, err
			}
		}
	}
	all.put(a)
	all.Current = name
	if err := all.write(path); err != nil {
		return 0, err
	}
	return exitOK, e.answer(a.shown(), func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "Logged in to %s as %s. Context %q is now the current one.\n", a.URL, a.User, name)
		return err
	})
}

// newPassword reads or asks for the password to set.
func (e *env) newPassword(a agentAt) (string, error) {
	if e.o.newPasswordFile != "" {
		return e.readSecret(e.o.newPasswordFile)
	}
	first, err := e.askSecret(fmt.Sprintf("New password of %s (empty: let one be made): ", a.User))
	if err != nil {
		return "", fmt.Errorf("%w; for the new one use -new-password-file", err)
	}
	if first == "" {
		first = rand.Text()
		fmt.Fprintf(e.stderr, "The new password of %s is %s\n", a.User, first)
		return first, nil
	}
	second, err := e.askSecret("Once more: ")
	if err != nil {
		return "", err
	}
	if first != second {
		return "", errors.New("the two are not the same; nothing was changed")
	}
	return first, nil
}

// hostName is the name of a context that was given none.
func hostName(raw string) (string, error) {
	u, err := url.Parse(raw)
	if err == nil && u.Host == "" {
		u, err = url.Parse("https://" + raw)
	}
	if err != nil || u.Host == "" {
		return "", &usageError{verb: "login", msg: fmt.Sprintf("-host: %q is not a URL like https://10.0.0.5", raw)}
	}
	return u.Host, nil
}
