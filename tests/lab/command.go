package lab

import (
	"context"
	"fmt"
	"io"
)

// Command is `backdoor lab`: args are what follows that word. It returns the exit code.
func Command(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	fmt.Fprintln(stderr, "usage: backdoor lab up|down|status|console|fault|exec")
	return 2
}
