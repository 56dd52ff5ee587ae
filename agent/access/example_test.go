package access

import (
	"errors"
	"os"
	"strings"
	"testing"
)

// The document in the package comment has the form that Load takes, and is refused only because nobody has signed it.
func TestPackageComment(t *testing.T) {
	src, err := os.ReadFile("access.go")
	if err != nil {
		t.Fatal(err)
	}
	var doc strings.Builder
	for line := range strings.Lines(string(src)) {
		if text, ok := strings.CutPrefix(line, "//\t"); ok {
			doc.WriteString(text)
		}
	}
	a, err := Parse(strings.NewReader(doc.String()))
	if err != nil {
		t.Fatalf("%v in\n%s", err, doc.String())
	}
	if _, err := Load(strings.NewReader(doc.String()), []byte(a.Owner.Key)); !errors.Is(err, ErrUnsigned) {
		t.Errorf("Load = %v; want ErrUnsigned", err)
	}
}
