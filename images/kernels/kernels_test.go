package kernels

import (
	"context"
	"flag"
	"testing"
)

var fetchAll = flag.Bool("fetch", false, "fetch every target into the user's kernel cache")

func TestFetchAll(t *testing.T) {
	if !*fetchAll {
		t.Skip("downloads 400 MB; run with -fetch")
	}
	for _, target := range Targets() {
		k, err := Fetch(context.Background(), "", target)
		if err != nil {
			t.Errorf("Fetch(%s): %v", target.Name, err)
			continue
		}
		t.Logf("%s: %s %s", target.Name, k.Package, k.Version)
	}
}
