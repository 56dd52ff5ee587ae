package boot

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// entropyWait bounds how long Up waits for the kernel's random numbers to be good.
const entropyWait = 20 * time.Second

// seedRandom asks the kernel for a random number in the way that makes it gather entropy by itself if it has no source
// (random(4); try_to_generate_entropy in drivers/char/random.c, Linux 5.4 and later): a blocking getrandom(2). Programs
// that only poll for it, as the DHCP client does, would wait for ever on a board without a random number generator.
func seedRandom() <-chan error {
	done := make(chan error, 1)
	go func() { // a system call cannot be taken back: it ends when the kernel has gathered enough
		var b [1]byte
		for {
			_, err := unix.Getrandom(b[:], 0)
			if !errors.Is(err, unix.EINTR) {
				done <- err
				return
			}
		}
	}()
	return done
}

func waitRandom(ctx context.Context, seeded <-chan error, wait time.Duration) (Outcome, string, error) {
	deadline := time.NewTimer(wait)
	defer deadline.Stop()
	select {
	case err := <-seeded:
		if err != nil {
			return Unclear, "", fmt.Errorf("seed the random number generator: %w", err)
		}
		return Done, "", nil
	case <-deadline.C:
		return Unclear, "", fmt.Errorf("the kernel has no good random numbers after %s", wait)
	case <-ctx.Done():
		return Unclear, "", ctx.Err()
	}
}
