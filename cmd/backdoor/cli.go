package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/redfish/client"
)

// The exit codes; the command's documentation promises them to scripts.
const (
	exitOK     = 0
	exitError  = 1
	exitUsage  = 2
	exitIll    = 3
	exitUnsure = 4
	exitDenied = 5
)

// verb is one word of the command line.
type verb struct {
	name  string
	args  string   // of the usage line
	words []string // the first argument is one of them, if there are any
	short string
	long  string // what it does, in whole sentences, and examples
	flags func(*flag.FlagSet, *options)
	run   func(context.Context, *env, []string) (int, error)
	// raw verbs get everything behind their name as it is.
	raw bool
}

// options are all flags. Each has one meaning for all verbs that know it.
type options struct {
	// where
	config, context, host, image, mem, layout, types string
	rdma, rdmaLocal, rdmaKey                         string
	// how to be let in
	user, passwordFile, newPasswordFile, ca, fingerprint string
	insecure                                             bool
	// how to answer
	json    bool
	timeout time.Duration

	// verbs' own
	all, threads, follow, previous, dryRun, yes, verify, savePassword, names, explain, twoPersons bool
	rows                                                                                          int
	interval                                                                                      time.Duration
	level, action, set, file, filter, after, output                                               string
	agreement                                                                                     agreementFlags
	attest                                                                                        attestFlags
	attested                                                                                      string
	img                                                                                           imageFlags
	flash                                                                                         flashFlags
	network                                                                                       networkFlags
}

func (o *options) global(fs *flag.FlagSet) {
	fs.StringVar(&o.config, "config", "", "configuration `file` with the contexts")
	fs.StringVar(&o.context, "context", "", "context to use instead of the current one, by its `name`")
	fs.StringVar(&o.host, "host", "", "agent to ask, by its `URL`, instead of a context")
	fs.StringVar(&o.image, "image", "", "crash dump `file` to read instead of asking an agent")
	fs.StringVar(&o.mem, "mem", "", "live RAM `file` of a virtual machine to read instead of asking an agent")
	fs.StringVar(&o.layout, "layout", "q35", "where RAM lies in the -mem file: q35, virt (arm64) or flat")
	fs.StringVar(&o.types, "types", "", "`file` or directory with the types of a kernel that carries none, for -image, -mem and -rdma (see types)")
	fs.StringVar(&o.user, "user", "", "user `name` at the agent (default admin, or the context's)")
	fs.StringVar(&o.passwordFile, "password-file", "", "`file` with the password, - for standard input")
	fs.StringVar(&o.ca, "ca", "", "PEM `file` with the authority that signed the agent's certificate")
	fs.StringVar(&o.fingerprint, "fingerprint", "", "`SHA-256` of the agent's certificate, as its console shows it")
	fs.BoolVar(&o.insecure, "insecure", false, "do not check the agent's certificate at all")
	fs.StringVar(&o.attested, "attested", "", "`file` that says what the agent has to prove before it is asked anything (see attest)")
	fs.BoolVar(&o.json, "json", false, "answer in JSON")
	fs.DurationVar(&o.timeout, "timeout", 30*time.Second, "longest `time` for one request")
	o.rdmaFlags(fs)
}

// env is what a verb works with.
type env struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	o              options
	set            map[string]bool // flags that were given
}

// usageError is a mistake on the command line.
type usageError struct {
	verb string
	msg  string
}

func (e *usageError) Error() string { return e.msg }

// codeError is an error with its exit code.
type codeError struct {
	code int
	err  error
}

func (e *codeError) Error() string { return e.err.Error() }
func (e *codeError) Unwrap() error { return e.err }

func verbs() []verb {
	return slices.Concat([]verb{statusVerb, findingsVerb, psVerb, topVerb, dmesgVerb}, listingVerbs(), []verb{
		healVerb, undoVerb, powerVerb, networkVerb, eventsVerb, metricsVerb, collectVerb, memoryVerb, tasksVerb, redfishVerb, journalVerb, incidentsVerb, policyVerb, attestVerb, enrollVerb, loginVerb, configVerb, agreementVerb, agreeVerb, imageVerb, flashVerb, typesVerb, goldenVerb, labVerb, completionVerb(), versionVerb, helpVerb(),
	})
}

func lookup(name string) (verb, bool) {
	for _, v := range verbs() {
		if v.name == name {
			return v, true
		}
	}
	return verb{}, false
}

// run is the whole command; it returns the exit code.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	e := &env{stdin: stdin, stdout: stdout, stderr: stderr}
	code, err := e.dispatch(ctx, args)
	if err == nil {
		return code
	}
	var usage *usageError
	if errors.As(err, &usage) {
		fmt.Fprintf(stderr, "backdoor: %v\n", err)
		fmt.Fprintf(stderr, "See: backdoor help%s\n", prefixed(" ", usage.verb))
		return exitUsage
	}
	fmt.Fprintf(stderr, "backdoor: %v\n", err)
	return exitCode(err)
}

func prefixed(prefix, s string) string {
	if s == "" {
		return ""
	}
	return prefix + s
}

// exitCode tells scripts what kind of error it was.
func exitCode(err error) int {
	var (
		code    *codeError
		refused *client.Error
		change  *client.PasswordChangeError
		corrupt *kernel.CorruptError
	)
	switch {
	case errors.As(err, &code):
		return code.code
	case errors.As(err, &change):
		return exitDenied
	case errors.As(err, &refused):
		switch refused.Status {
		case http.StatusUnauthorized, http.StatusForbidden:
			return exitDenied
		}
	case errors.Is(err, kernel.ErrNotFound), errors.Is(err, kernel.ErrNotSupported), errors.Is(err, kernel.ErrTorn), errors.As(err, &corrupt):
		return exitUnsure
	}
	return exitError
}

// dispatch finds the verb, wherever the flags stand, and runs it.
func (e *env) dispatch(ctx context.Context, args []string) (int, error) {
	name, at := findVerb(args)
	if name == "" {
		if len(args) == 0 {
			return exitUsage, usageText(e.stderr, verb{})
		}
		if slices.ContainsFunc(args, isHelp) {
			return exitOK, usageText(e.stdout, verb{})
		}
		return 0, &usageError{msg: "no verb given"}
	}
	if format, ok := strings.CutPrefix(name, "x/"); ok { // as gdb has it
		args = slices.Insert(slices.Clone(args), at+1, format)
		name = "x"
	}
	v, ok := lookup(name)
	if !ok {
		return 0, &usageError{msg: fmt.Sprintf("there is no verb %q", name)}
	}
	fs := flag.NewFlagSet("backdoor "+v.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	e.o.global(fs)
	if v.flags != nil {
		v.flags(fs, &e.o)
	}
	rest := slices.Delete(slices.Clone(args), at, at+1)
	if v.raw {
		if rest = args[:at]; len(rest) > 0 {
			return 0, &usageError{verb: v.name, msg: fmt.Sprintf("flags for %s stand behind that word", v.name)}
		}
	}
	pos, err := permute(fs, rest)
	if errors.Is(err, flag.ErrHelp) {
		return exitOK, usageText(e.stdout, v)
	}
	if err != nil {
		return 0, &usageError{verb: v.name, msg: err.Error()}
	}
	if v.raw {
		pos = args[at+1:]
	}
	e.set = make(map[string]bool)
	fs.Visit(func(f *flag.Flag) { e.set[f.Name] = true })
	if len(v.words) > 0 && !v.raw {
		if len(pos) == 0 {
			return 0, &usageError{verb: v.name, msg: fmt.Sprintf("%s: say which: %s", v.name, strings.Join(v.words, ", "))}
		}
		if !slices.Contains(v.words, pos[0]) {
			return 0, &usageError{verb: v.name, msg: fmt.Sprintf("%s: %q is none of %s", v.name, pos[0], strings.Join(v.words, ", "))}
		}
	}
	return v.run(ctx, e, pos)
}

func isHelp(a string) bool { return a == "-h" || a == "-help" || a == "--help" }

// findVerb returns the first argument that is neither a flag nor the value of one. All flags of all verbs count, so that
// a verb's own flag may stand before it.
func findVerb(args []string) (string, int) {
	all := flag.NewFlagSet("", flag.ContinueOnError)
	new(options).global(all)
	takes := make(map[string]bool) // a value behind the flag
	note := func(f *flag.Flag) { takes[f.Name] = takesValue(f) }
	all.VisitAll(note)
	for _, v := range verbs() {
		if v.flags != nil {
			fs := flag.NewFlagSet("", flag.ContinueOnError)
			v.flags(fs, new(options))
			fs.VisitAll(note)
		}
	}
	for i := 0; i < len(args); i++ {
		a := args[i]
		if len(a) < 2 || a[0] != '-' {
			return a, i
		}
		name := strings.TrimLeft(a, "-")
		if name == "" {
			return "", 0
		}
		if !strings.Contains(name, "=") && takes[name] {
			i++
		}
	}
	return "", 0
}

// permute parses flags that stand anywhere among the arguments, and returns the others. Behind "--" nothing is a flag.
func permute(fs *flag.FlagSet, args []string) ([]string, error) {
	var pos []string
	for len(args) > 0 {
		a := args[0]
		if a == "--" {
			return append(pos, args[1:]...), nil
		}
		if len(a) < 2 || a[0] != '-' {
			pos, args = append(pos, a), args[1:]
			continue
		}
		n := 1
		if f := fs.Lookup(strings.TrimLeft(a, "-")); f != nil && takesValue(f) {
			n = min(2, len(args))
		}
		if err := fs.Parse(args[:n]); err != nil {
			return nil, err
		}
		args = args[n:]
	}
	return pos, nil
}

// takesValue tells whether the value of a flag is the argument behind it.
func takesValue(f *flag.Flag) bool {
	b, ok := f.Value.(interface{ IsBoolFlag() bool })
	return !ok || !b.IsBoolFlag()
}

// usageText prints the help of a verb, or of the command if the verb is empty.
func usageText(w io.Writer, v verb) error {
	p := &lines{w: w}
	if v.name == "" {
		p.printf("Backdoor asks an agent about the host that it watches, and has the host healed.\n\n")
		p.printf("Usage: backdoor [flags] VERB [arguments]\n\nVerbs:\n")
		for _, v := range verbs() {
			p.printf("  %-12s %s\n", v.name, v.short)
		}
		p.printf("\nFlags of every verb, before or after it:\n")
		fs := flag.NewFlagSet("", flag.ContinueOnError)
		new(options).global(fs)
		p.flags(fs)
		p.printf("\nExit status: 0 well, 1 error, 2 usage, 3 the host is ill, 4 could not tell, 5 denied.\n")
		p.printf("More about a verb: backdoor help VERB\n")
		return p.err
	}
	p.printf("Usage: backdoor [flags] %s%s\n\n%s: %s.\n", v.name, prefixed(" ", v.args), v.name, v.short)
	if v.long != "" {
		p.printf("\n%s\n", strings.TrimSpace(v.long))
	}
	if v.flags != nil {
		fs := flag.NewFlagSet("", flag.ContinueOnError)
		v.flags(fs, new(options))
		p.printf("\nFlags:\n")
		p.flags(fs)
	}
	p.printf("\nThe flags of every verb: backdoor help\n")
	return p.err
}

// lines prints until the first error.
type lines struct {
	w   io.Writer
	err error
}

func (p *lines) printf(format string, a ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format, a...)
	}
}

func (p *lines) flags(fs *flag.FlagSet) {
	fs.VisitAll(func(f *flag.Flag) {
		value, usage := flag.UnquoteUsage(f)
		def := ""
		if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" && f.DefValue != "0s" {
			def = fmt.Sprintf(" (default %s)", f.DefValue)
		}
		p.printf("  %-24s %s%s\n", "-"+f.Name+prefixed(" ", value), usage, def)
	})
}

// answer prints an answer as JSON if asked for, else as text.
func (e *env) answer(v any, text func(io.Writer) error) error {
	if !e.o.json {
		return text(e.stdout)
	}
	return e.json(v)
}

func (e *env) json(v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("answer in JSON: %w", err)
	}
	_, err = e.stdout.Write(append(harmless(b), '\n'))
	return err
}

// jsonLine writes v as one line.
func (e *env) jsonLine(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("answer in JSON: %w", err)
	}
	_, err = e.stdout.Write(append(harmless(b), '\n'))
	return err
}

// harmless escapes what JSON allows in a string and a terminal may act on: the C1 controls, invisible and
// direction-changing characters. In the output of encoding/json they stand nowhere else than in strings.
func harmless(b []byte) []byte {
	out := make([]byte, 0, len(b))
	for _, r := range string(b) {
		switch {
		case r < 0x7f || strconv.IsPrint(r):
			out = utf8.AppendRune(out, r)
		case r > 0xffff:
			hi, lo := utf16.EncodeRune(r)
			out = fmt.Appendf(out, "\\u%04x\\u%04x", hi, lo)
		default:
			out = fmt.Appendf(out, "\\u%04x", r)
		}
	}
	return out
}

// file is the input as a file, or nil if it is none.
func file(r any) *os.File {
	f, _ := r.(*os.File)
	return f
}
