package slot

import (
	"os"
	"testing"
	"time"
)

// Do not change this test, nor testdata/v1.state: it is what version 1 of the state is, and loaders that are never updated read and write it.

func TestGoldenV1(t *testing.T) {
	b, err := os.ReadFile("testdata/v1.state")
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeState(b)
	if err != nil {
		t.Fatal(err)
	}
	want := goldenState()
	if got != want {
		t.Errorf("version 1 reads as %+v; want %+v", got, want)
	}
	if order := got.Order(2); len(order) != 3 || order[0] != B || order[1] != A || order[2] != Golden {
		t.Errorf("it starts %v", order)
	}
}

func goldenState() State {
	return State{
		Seq: 41, Active: A, Epoch: 2, Root: 1, Fallback: "slot b, version 1.3.0: why", Lowest: "1.2.0",
		A:      Slot{Status: Good, Version: "1.2.0", Epoch: 2, Root: 1, Digest: "aa", Size: 4096, Boots: 1, Installed: time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)},
		B:      Slot{Status: Trial, Version: "1.4.0", Epoch: 2, Root: 1, Digest: "bb", Size: 8192, Boots: 2, Reason: "not yet"},
		Golden: Slot{Status: Good, Version: "1.2.0", Epoch: 2, Root: 1, Digest: "aa", Size: 4096},
	}
}
