package engine

import (
	"flag"
	"strings"
	"testing"

	"github.com/backdoor-rhs/backdoor/tests/guest"
)

var (
	guestsFlag = flag.String("guests", "6.1", "comma-separated `kernels` to boot in QEMU and heal (6.1, 6.12, 6.1-generic, 6.12-generic, or all)")
	killsFlag  = flag.Int("kills", 3, "how often to kill each kind of victim")
)

const guestUUID = guest.UUID

// forEachGuest runs f for the kernels that were asked for: if none were, for the usual ones and for more.
func forEachGuest(t *testing.T, f func(t *testing.T, kernel string), more ...string) {
	if testing.Short() {
		t.Skip("boots kernels in QEMU, a minute for each: not with -short")
	}
	want := append([]string{"6.1", "6.12", "6.1-generic", "6.12-generic"}, more...)
	if *guestsFlag != "all" {
		want = strings.Split(*guestsFlag, ",")
	}
	for _, k := range want {
		t.Run(k, func(t *testing.T) { f(t, k) })
	}
}

func startGuest(t *testing.T, kernel string) *guest.Guest {
	return guest.Start(t, kernel, guest.Options{})
}
