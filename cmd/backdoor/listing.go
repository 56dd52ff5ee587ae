package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"strings"

	"github.com/backdoor-rhs/backdoor/agent/query"
	"github.com/backdoor-rhs/backdoor/redfish/client"
)

// listingVerbs are the verbs that ask one question about the host each, and those that look at its memory by RDMA; the table of them is that of package query.
func listingVerbs() []verb {
	out := []verb{attachVerb}
	for _, l := range query.Listings() {
		secrets := new(bool)
		out = append(out, verb{
			name: l.Name, args: l.Args, short: l.Short, long: l.Long,
			flags: func(fs *flag.FlagSet, _ *options) {
				if l.Secret {
					fs.BoolVar(secrets, "secrets", false, "show memory, that of programs among it, whatever it holds")
				}
			},
			run: func(ctx context.Context, e *env, args []string) (int, error) {
				if l.Secret && !*secrets {
					return 0, &usageError{verb: l.Name, msg: l.Name + " can show memory of programs, which may hold passwords: if you mean to, say -secrets"}
				}
				return e.list(ctx, l, args)
			},
		})
	}
	return append(out, rdmaVerbs()...)
}

func (e *env) list(ctx context.Context, l query.Listing, args []string) (int, error) {
	least, most := 0, len(strings.Fields(l.Args))
	for _, a := range strings.Fields(l.Args) {
		if a[0] != '[' {
			least++
		}
	}
	switch {
	case most == 0 && len(args) > 0:
		return 0, none(l.Name, args)
	case len(args) < least || len(args) > most:
		return 0, &usageError{verb: l.Name, msg: fmt.Sprintf("%s: want %s", l.Name, l.Args)}
	}
	s, err := e.open(ctx)
	if err != nil {
		return 0, err
	}
	defer s.Close()
	a, err := s.List(ctx, l, args)
	var wrong *query.ArgumentError
	if errors.As(err, &wrong) {
		return 0, &usageError{verb: l.Name, msg: err.Error()}
	}
	if err != nil {
		return 0, err
	}
	code := complete(a.Whole().Complete)
	if ill, ok := a.(interface{ Ill() bool }); ok && ill.Ill() {
		code = exitIll
	}
	return code, e.answer(a, a.Text)
}

func (m *memory) List(ctx context.Context, l query.Listing, args []string) (query.Answer, error) {
	return l.Ask(ctx, m.img.View(ctx), args)
}

func (a *agent) List(ctx context.Context, l query.Listing, args []string) (query.Answer, error) {
	switch {
	case !l.Served:
		return nil, &usageError{verb: l.Name, msg: fmt.Sprintf("agents do not serve %s: it works with -image and -mem", l.Name)}
	case len(args) > 0:
		return nil, &usageError{verb: l.Name, msg: fmt.Sprintf("agents answer %s for the whole host: %s works with -image and -mem", l.Name, l.Args)}
	}
	r := struct{ Answer query.Answer }{l.Empty()}
	if err := a.get(ctx, client.ListingURI(l.Resource), &r); err != nil {
		return nil, unattached(err)
	}
	return r.Answer, nil
}
