package policy

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/backdoor-rhs/backdoor/agent/detect"
)

// The document in the package comment is one that Load takes, and its settings are the defaults as it says.
func TestPackageComment(t *testing.T) {
	src, err := os.ReadFile("policy.go")
	if err != nil {
		t.Fatal(err)
	}
	var doc strings.Builder
	for line := range strings.Lines(string(src)) {
		if text, ok := strings.CutPrefix(line, "//\t"); ok {
			doc.WriteString(text)
		}
	}
	p, err := Load(strings.NewReader(doc.String()))
	if err != nil {
		t.Fatalf("%v in\n%s", err, doc.String())
	}
	want := len(detect.Kinds()) + 1 // and one for a watch
	for _, k := range detect.Kinds() {
		want += len(detect.Aspects(k))
	}
	if n := len(p.Rules); n != want {
		t.Errorf("it has rules for %d kinds and aspects of findings of %d", n, want)
	}
	got, usual := p.DetectConfig(), detect.DefaultConfig()
	got.RunawayExempt = nil
	if diff := cmp.Diff(usual, got); diff != "" {
		t.Errorf("its detectors differ from the defaults (-default +comment):\n%s", diff)
	}
}
