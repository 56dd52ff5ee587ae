package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/backdoor-rhs/backdoor/cmd/internal/agree"
	"github.com/backdoor-rhs/backdoor/cmd/internal/version"
	"github.com/backdoor-rhs/backdoor/tests/lab"
)

var labVerb = verb{
	name:  "lab",
	args:  "up|down|status|fault|power|exec|console …",
	words: []string{"up", "down", "status", "fault", "power", "exec", "console"},
	short: "two virtual machines to try all of this on",
	long:  "Everything behind the word lab is the laboratory's own; see: backdoor lab -h",
	raw:   true,
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		return lab.Command(ctx, args, e.stdin, e.stdout, e.stderr), nil
	},
}

var agreeVerb = verb{
	name:  "agree",
	args:  "[-mailbox] FILE",
	short: "the host's part in an access agreement, run on the host when it is set up",
	long: `The same as the small program backdoor-agree, which needs nothing else on the host; see: backdoor agree -h

  backdoor agree draft.json             show what the draft permits, ask, and sign it for the host; owner and monitors sign it then
  backdoor agree -mailbox signed.json   hold the signed document where an agent finds it that holds none yet`,
	raw: true,
	run: func(ctx context.Context, e *env, args []string) (int, error) {
		return agree.Main(ctx, args, e.stdin, e.stdout, e.stderr), nil
	},
}

var versionVerb = verb{
	name:  "version",
	short: "the version of this program",
	run: func(_ context.Context, e *env, args []string) (int, error) {
		if err := none("version", args); err != nil {
			return 0, err
		}
		return exitOK, e.answer(version.Get(), func(w io.Writer) error {
			_, err := fmt.Fprintln(w, "backdoor", version.String())
			return err
		})
	},
}

// helpVerb and completionVerb look through all verbs, themselves among them, which a variable could not.
func helpVerb() verb {
	return verb{
		name:  "help",
		args:  "[VERB]",
		short: "help for a verb",
		run:   func(_ context.Context, e *env, args []string) (int, error) { return help(e, args) },
	}
}

func help(e *env, args []string) (int, error) {
	switch len(args) {
	case 0:
		return exitOK, usageText(e.stdout, verb{})
	case 1:
		v, ok := lookup(args[0])
		if !ok {
			return 0, &usageError{msg: fmt.Sprintf("there is no verb %q", args[0])}
		}
		return exitOK, usageText(e.stdout, v)
	}
	return 0, &usageError{verb: "help", msg: "help takes one verb"}
}

func completionVerb() verb {
	return verb{
		name:  "completion",
		args:  "bash|zsh|fish",
		words: []string{"bash", "zsh", "fish"},
		short: "completion for bash, zsh or fish",
		long: `Prints a script for the shell.

  source <(backdoor completion bash)
  backdoor completion zsh > "${fpath[1]}/_backdoor"
  backdoor completion fish > ~/.config/fish/completions/backdoor.fish`,
		run: func(_ context.Context, e *env, args []string) (int, error) {
			if len(args) != 1 {
				return 0, &usageError{verb: "completion", msg: "completion takes one shell"}
			}
			return exitOK, completion(e.stdout, args[0])
		},
	}
}

// flagsOf lists the flags of a verb, "-" included, sorted.
func flagsOf(v verb) []string {
	fs := flag.NewFlagSet("", flag.ContinueOnError)
	if v.name == "" {
		new(options).global(fs)
	} else if v.flags != nil {
		v.flags(fs, new(options))
	}
	var names []string
	fs.VisitAll(func(f *flag.Flag) { names = append(names, "-"+f.Name) })
	slices.Sort(names)
	return names
}

// completion prints the script for a shell. It is made from the same tables that the command works by.
func completion(w io.Writer, shell string) error {
	l := &lines{w: w}
	var names []string
	for _, v := range verbs() {
		names = append(names, v.name)
	}
	global := strings.Join(flagsOf(verb{}), " ")
	switch shell {
	case "bash", "zsh":
		if shell == "zsh" {
			l.printf("#compdef backdoor\nautoload -U +X bashcompinit && bashcompinit\n")
		}
		l.printf("_backdoor() {\n\tlocal cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} verb= w\n\tlocal words= flags='%s'\n", global)
		l.printf("\tcase $prev in\n\t-context|use-context|set-context|delete-context)\n\t\tCOMPREPLY=($(compgen -W \"$(backdoor config get-contexts -names 2>/dev/null)\" -- \"$cur\")); return;;\n")
		l.printf("\t-image|-mem|-config|-ca|-password-file|-new-password-file|-file|-key)\n\t\tCOMPREPLY=($(compgen -f -- \"$cur\")); return;;\n\tesac\n")
		l.printf("\tfor w in \"${COMP_WORDS[@]:1:COMP_CWORD-1}\"; do\n\t\tcase $w in %s) verb=$w; break;; esac\n\tdone\n", strings.Join(names, "|"))
		l.printf("\tcase $verb in\n\t'') words='%s';;\n", strings.Join(names, " "))
		for _, v := range verbs() {
			words := v.words
			if v.name == "help" {
				words = names
			}
			l.printf("\t%s) words='%s'; flags=\"$flags %s\";;\n", v.name, strings.Join(words, " "), strings.Join(flagsOf(v), " "))
		}
		l.printf("\tesac\n\tcase $cur in\n\t-*) COMPREPLY=($(compgen -W \"$flags\" -- \"$cur\"));;\n\t*) COMPREPLY=($(compgen -W \"$words\" -- \"$cur\"));;\n\tesac\n}\n")
		l.printf("complete -F _backdoor backdoor\n")
	case "fish":
		l.printf("complete -c backdoor -f\n")
		l.printf("set -l verbs %s\n", strings.Join(names, " "))
		for _, v := range verbs() {
			l.printf("complete -c backdoor -n \"not __fish_seen_subcommand_from $verbs\" -a %s -d '%s'\n", v.name, strings.ReplaceAll(v.short, "'", `\'`))
			if len(v.words) > 0 {
				l.printf("complete -c backdoor -n \"__fish_seen_subcommand_from %s\" -a '%s'\n", v.name, strings.Join(v.words, " "))
			}
			for _, f := range flagsOf(v) {
				l.printf("complete -c backdoor -n \"__fish_seen_subcommand_from %s\" -o %s\n", v.name, f[1:])
			}
		}
		for _, f := range flagsOf(verb{}) {
			switch f {
			case "-image", "-mem", "-config", "-ca", "-password-file":
				l.printf("complete -c backdoor -o %s -r -F\n", f[1:])
			case "-context":
				l.printf("complete -c backdoor -o context -x -a '(backdoor config get-contexts -names 2>/dev/null)'\n")
			default:
				l.printf("complete -c backdoor -o %s\n", f[1:])
			}
		}
	}
	return l.err
}
