package query

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/agent/detect"
	"github.com/backdoor-rhs/backdoor/agent/journal"
)

func records(t *testing.T, lines ...string) []journal.Record {
	t.Helper()
	var out []journal.Record
	for i, l := range lines {
		kind, data, _ := strings.Cut(l, " ")
		if data != "" && !json.Valid([]byte(data)) {
			t.Fatalf("%s", data)
		}
		out = append(out, journal.Record{Seq: uint64(100 + i), Time: time.Unix(1_800_000_000+int64(i), 0), Kind: kind, Data: json.RawMessage(data)})
	}
	return out
}

func TestIncidents(t *testing.T) {
	all := Incidents(records(t,
		`start {"writes":true}`,
		`finding {"id":"runaway-process-1","kind":"runaway-process","severity":"Warning","title":"\"x\u001b[2J\" eats a CPU","detail":"of two","culprit":{"pid":7,"comm":"x"},"evidence":[{"what":"share","value":"1.0"}],"confidence":0.95}`,
		`intent {"plan":{"id":"plan-1","action":"kill-process","finding":"runaway-process-1","title":"end x"},"caller":"policy"}`,
		`store {"plan":"plan-1","step":3,"addr":8256,"old":"(00*80)","new":"(00*16)0102(00*62)"}`,
		`store {"plan":"plan-1","step":5,"addr":9000,"old":"0000000000000000","new":"8877665544332211"}`,
		`outcome {"plan":{"id":"plan-1","action":"kill-process","finding":"runaway-process-1"},"verified":true}`,
		`resolved {"id":"runaway-process-1","title":"x","resolution":"healed by plan-1 (kill-process)"}`,
		`finding {"id":"panic-1","kind":"panic","title":"Kernel panic"}`,
		`refused {"finding":"panic-1","action":"power-cycle","caller":"u","error":"not permitted"}`,
		`store {"plan":"plan-9","step":0,"addr":1,"old":"00","new":"01"}`,
		`start {}`,
		`intent {"plan":{"id":"plan-2","action":"arm-panic","finding":"panic-1","title":"take back"},"caller":"u"}`, // of before the start
		`finding {"id":"runaway-process-1","kind":"runaway-process","title":"another under the same name"}`,
		`garbage "x"`,
		`finding "x"`,
	))
	if len(all) != 3 {
		t.Fatalf("%d incidents: %+v", len(all), all)
	}
	a, b, c := all[0], all[1], all[2]
	if a.Number != 101 || a.Stores != 2 || a.Bytes != 88 || a.Resolution != "healed by plan-1 (kill-process)" || len(a.Timeline) != 6 || a.Ended.Sub(a.Began) != 5*time.Second {
		t.Errorf("the first: %+v", a)
	}
	if b.Number != 107 || len(b.Timeline) != 4 || b.Timeline[1].Text != "not permitted" || b.Timeline[3].Plan != "plan-2" || b.Ended.Sub(b.Began) != 3*time.Second {
		t.Errorf("the second: %+v", b)
	}
	if c.Number != 112 || len(c.Timeline) != 1 {
		t.Errorf("the third: %+v", c)
	}
	var list, story, short bytes.Buffer
	if err := WriteIncidents(&list, all); err != nil {
		t.Fatal(err)
	}
	if err := WriteIncident(&story, a, true); err != nil {
		t.Fatal(err)
	}
	if err := WriteIncident(&short, a, false); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"share: 1.0", "at 0x2040: (00*80) → (00*16)0102(00*62)", "+1s", "asked for by policy", "the detector is silent", "2 stores, 88 bytes"} {
		if !strings.Contains(story.String(), want) {
			t.Errorf("the story lacks %q:\n%s", want, &story)
		}
	}
	if strings.Contains(short.String(), "0x2040") || strings.ContainsRune(list.String()+story.String(), '\x1b') {
		t.Errorf("short:\n%s\nlist:\n%s", &short, &list)
	}
}

func FuzzIncidents(f *testing.F) {
	f.Add("finding", []byte(`{"id":"a-1"}`), "store", []byte(`{"plan":"plan-1","new":"(00*"}`))
	f.Add("intent", []byte(`{"plan":{"id":"p","finding":"a-1"}}`), "outcome", []byte(`{"plan":{"id":"p"}}`))
	f.Fuzz(func(t *testing.T, k1 string, d1 []byte, k2 string, d2 []byte) {
		all := Incidents([]journal.Record{{Seq: 1, Kind: "finding", Data: json.RawMessage(`{"id":"a-1"}`)}, {Seq: 2, Kind: k1, Data: d1}, {Seq: 3, Kind: k2, Data: d2}})
		for _, i := range all {
			if err := WriteIncident(&bytes.Buffer{}, i, true); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestCures(t *testing.T) {
	of := func(k detect.Kind, as ...Attempt) Incident {
		return Incident{Finding: detect.Finding{Kind: k}, Attempts: as}
	}
	var all []Incident
	for i := range 10 {
		all = append(all, of("a", Attempt{"often", i > 0}))
	}
	all = append(all, of("a", Attempt{"once", true}, Attempt{"never", false}), of("b", Attempt{"never", true}))
	want := []Cure{{"a", "often", 10, 9}, {"a", "once", 1, 1}, {"a", "never", 1, 0}, {"b", "never", 1, 1}}
	if got := Cures(all); !slices.Equal(got, want) {
		t.Errorf("%+v; want %+v", got, want)
	}
	var i Incident
	for _, cured := range []bool{false, true, false} { // a repair in several plans
		i.attempt("x", cured)
	}
	if !slices.Equal(i.Attempts, []Attempt{{"x", true}}) {
		t.Errorf("%+v", i.Attempts)
	}
}
