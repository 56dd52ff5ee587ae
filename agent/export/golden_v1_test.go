package export

import (
	"bytes"
	"encoding/hex"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The wire forms of version 1. Do not change these tests: monitors that read them are in the field.

// testdata/health-v1.page is the page of healthV1, made when version 1 was.
func healthV1() Health {
	return Health{
		Summary:  Summary{Version: 1, Verdict: Ill, Phase: Attached, Findings: 2, Beat: 0x01020304},
		Sequence: 0x1112131415161718, Restart: 0x2122232425262728, Written: time.Unix(1700000000, 123456789).UTC(), Moved: time.Unix(1699999999, 0).UTC(),
		Passes: 0x3132333435363738, Took: 1234567, Journal: 0x4142434445464748, Flags: FlagDead | FlagWrites | FlagHealing, Confidence: 0.9876,
		CPUs: []CPUHealth{{ID: 0, Online: true, Progress: 0x5152535455565758}, {ID: 5, Online: true, Idle: true, Progress: 1}, {ID: 63}},
		Open: []FindingHealth{
			{Critical: true, Confidence: 1, FirstSeen: time.Unix(1699999000, 1).UTC(), ID: "cpu-stall-1", Title: "CPU 1 makes no progress"},
			{Confidence: 0.5, FirstSeen: time.Unix(1699999001, 0).UTC(), ID: "runaway-process-12", Title: "spin (412) eats a CPU: größer"},
		},
	}
}

func TestHealthV1(t *testing.T) {
	want, err := os.ReadFile("testdata/health-v1.page")
	if err != nil {
		t.Fatal(err)
	}
	h := healthV1()
	if got := h.append(nil); !bytes.Equal(got, want) {
		t.Errorf("the page of version 1 has changed:\n%s", cmp.Diff(hex.Dump(want), hex.Dump(got)))
	}
	got, err := ParsePage(want)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(h, got); diff != "" {
		t.Error(diff)
	}
	// A few bytes by hand, so that this does not rest on the file alone.
	for _, c := range []struct {
		off  int
		want string
	}{
		{0, "0102020204030201"}, {8, "1817161514131211"}, {16, "42444845414c5448"}, {24, "2827262524232221"}, {32, "15cd853dfe9c9717"},
		{72, "07000000"}, {76, "9426"}, {78, "0302"}, {128, "00000000010000005857565554535251"}, {144, "0500000003000000"},
		{1152, "0200102700000000"}, {1152 + 16, "6370752d7374616c6c2d3100"}, {1152 + 176, "0100881300000000"}, {4088, "1817161514131211"},
	} {
		if got := hex.EncodeToString(want[c.off:][:len(c.want)/2]); got != c.want {
			t.Errorf("bytes at %d are %s; want %s", c.off, got, c.want)
		}
	}
}

// The expected bytes were worked out by another implementation of HMAC-SHA256.
func TestTokenV1(t *testing.T) {
	key := Key{"ops", [KeySize]byte(bytes.Repeat([]byte{7}, KeySize))}
	q := Request{Kind: KindMemory, Start: 0x1000, Length: 0x2000, Write: true, Atomic: true}
	b := key.token(time.Unix(1700000000, 5), q, netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::2"))
	const want = "01010300" + "e0c7d61937059486" + "05002a36fe9c9717" + "0010000000000000" + "0020000000000000" + "f798443afc9522dc224c76eeedc61a72a6d35de2"
	if got := hex.EncodeToString(b); got != want {
		t.Errorf("token is %s; want %s", got, want)
	}
}

func TestMessageV1(t *testing.T) {
	m := message{typeResult, true, 0x01020304, []byte("{}")}
	const want = "01030100040302017b7d"
	if got := hex.EncodeToString(m.bytes()); got != want {
		t.Errorf("message is %s; want %s", got, want)
	}
}

func TestReplyV1(t *testing.T) {
	l := lease{Lease: Lease{
		ID: "0102030405060708", Kind: KindMemory, Write: true, RKey: 0x11121314, Addr: 0x2122232425262728, Length: 0x3132333435363738,
		Expires: time.Unix(1700000000, 0).UTC(), MapKey: 0x41424344, MapLength: 0x51525354,
	}}
	const want = "01010100" + "14131211" + "2827262524232221" + "3837363534333231" + "00f1536500000000" + "44434241" + "54535251" + "0102030405060708"
	b := l.private()
	if got := hex.EncodeToString(b); got != want {
		t.Errorf("private data is %s; want %s", got, want)
	}
	if got, err := parsePrivate(b); err != nil || got != l.Lease {
		t.Errorf("parsePrivate = %+v, %v; want %+v", got, err, l.Lease)
	}
}
