package agree

import (
	"context"
	"flag"
	"fmt"
	"io"
)

// Main is the program. It returns the exit status: 0 done, 1 an error, 2 wrong usage.
func Main(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	var o Options
	fs := flag.NewFlagSet("backdoor-agree", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() { fmt.Fprint(stderr, usage); fs.PrintDefaults() }
	o.flags(fs)
	if err := fs.Parse(args); err != nil || fs.NArg() != 1 {
		if err == nil {
			fs.Usage()
		}
		return 2
	}
	if err := Run(ctx, o, fs.Arg(0), stdin, stdout); err != nil {
		fmt.Fprintln(stderr, "backdoor-agree:", err)
		return 1
	}
	return 0
}
