package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"path/filepath"
	"slices"

	"github.com/backdoor-rhs/backdoor/agent/query"
)

var configVerb = verb{
	name:  "config",
	args:  "get-contexts|use-context NAME|set-context NAME|delete-context NAME|view",
	words: []string{"get-contexts", "use-context", "set-context", "delete-context", "view"},
	short: "the agents that you know",
	long: `  get-contexts         list the contexts; with -names only their names
  use-context NAME     make a context the current one
  set-context NAME     make or change a context, from -host, -user, -password-file, -ca, -fingerprint and -insecure
  delete-context NAME  forget a context
  view                 show the whole file, without its secrets

  backdoor config set-context dpu1 -host https://10.0.0.5 -user operator -password-file ~/.dpu1
  backdoor config use-context dpu1`,
	flags: func(fs *flag.FlagSet, o *options) {
		fs.BoolVar(&o.names, "names", false, "only the names, one a line")
	},
	run: runConfig,
}

func runConfig(_ context.Context, e *env, args []string) (int, error) {
	path, err := e.contextsPath()
	if err != nil {
		return 0, err
	}
	c, err := readContexts(path)
	if err != nil {
		return 0, err
	}
	word, args := args[0], args[1:]
	if word == "get-contexts" || word == "view" {
		if err := none("config", args); err != nil {
			return 0, err
		}
		shown := c
		shown.Contexts = []agentAt{}
		for _, a := range c.Contexts {
			shown.Contexts = append(shown.Contexts, a.shown())
		}
		if word == "view" {
			return exitOK, e.json(shown)
		}
		return exitOK, e.answer(shown, func(w io.Writer) error { return e.contextsText(w, c) })
	}
	if len(args) != 1 || args[0] == "" {
		return 0, &usageError{verb: "config", msg: fmt.Sprintf("config %s takes the name of one context", word)}
	}
	name := args[0]
	switch word {
	case "use-context":
		if _, err := c.find(name); err != nil {
			return 0, err
		}
		c.Current = name
	case "delete-context":
		if _, err := c.find(name); err != nil {
			return 0, err
		}
		c.Contexts = slices.DeleteFunc(c.Contexts, func(a agentAt) bool { return a.Name == name })
		if c.Current == name {
			c.Current = ""
		}
	case "set-context":
		a, err := c.find(name)
		if err != nil {
			if e.o.host == "" {
				return 0, &usageError{verb: "config", msg: fmt.Sprintf("there is no context %q yet: a new one needs -host URL", name)}
			}
			a = agentAt{Name: name}
		}
		if err := e.change(&a); err != nil {
			return 0, err
		}
		c.put(a)
		if c.Current == "" {
			c.Current = name
		}
	}
	return exitOK, c.write(path)
}

// change applies the flags that were given to a context.
func (e *env) change(a *agentAt) error {
	if e.o.host != "" && e.o.host != a.URL {
		if _, err := hostName(e.o.host); err != nil {
			return err
		}
		// Another machine: what let us into the old one is none of its business.
		*a = agentAt{Name: a.Name, URL: e.o.host, User: a.User}
	}
	if e.o.user != "" && e.o.user != a.User {
		a.User, a.Password, a.Token, a.Session = e.o.user, "", "", ""
	}
	files := map[string]*string{e.o.passwordFile: &a.PasswordFile, e.o.ca: &a.CAFile}
	for from, to := range files {
		if from == "" {
			continue
		}
		abs, err := filepath.Abs(from)
		if err != nil {
			return err
		}
		*to = abs
	}
	if e.o.passwordFile != "" {
		if e.o.passwordFile == "-" {
			return &usageError{verb: "config", msg: "a context cannot keep standard input: name a file, or use backdoor login"}
		}
		a.Password, a.Token, a.Session = "", "", ""
	}
	switch {
	case e.o.ca != "":
		a.Fingerprint, a.Insecure = "", false
	case e.o.fingerprint != "":
		a.Fingerprint, a.CAFile, a.Insecure = e.o.fingerprint, "", false
	case e.set["insecure"]:
		a.Insecure = e.o.insecure
		if a.Insecure {
			a.Fingerprint, a.CAFile = "", ""
		}
	}
	return nil
}

func (e *env) contextsText(w io.Writer, c contexts) error {
	l := &lines{w: w}
	if e.o.names {
		for _, a := range c.Contexts {
			l.printf("%s\n", query.Clean(a.Name))
		}
		return l.err
	}
	if len(c.Contexts) == 0 {
		l.printf("No contexts. Make one with: backdoor login -host URL -context NAME\n")
		return l.err
	}
	l.printf("%-1s %-20s %-36s %-12s %s\n", "", "NAME", "URL", "USER", "CERTIFICATE")
	for _, a := range c.Contexts {
		mark, cert := "", "system's authorities"
		if a.Name == c.Current {
			mark = "*"
		}
		switch {
		case a.Insecure:
			cert = "NOT CHECKED"
		case a.Fingerprint != "":
			cert = "pinned"
		case a.CAFile != "":
			cert = a.CAFile
		}
		l.printf("%-1s %-20s %-36s %-12s %s\n", mark, query.Clean(a.Name), query.Clean(a.URL), query.Clean(a.User), query.Clean(cert))
	}
	return l.err
}
