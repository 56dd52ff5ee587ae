package tests

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/backdoor-rhs/backdoor/"

// layers gives each package tree its floor; the longest prefix wins. Imports go down only.
var layers = map[string]int{
	"internal":         -1,
	"nicfw":            0,
	"agent/journal":    0,
	"boot":             0,
	"redfish/schema":   0,
	"redfish/service":  0,
	"redfish/oem":      0,
	"agent/access":     1,
	"agent/kernel":     1,
	"agent/detect":     2,
	"agent/heal":       2,
	"agent/policy":     2,
	"agent/query":      2,
	"agent/dump":       2,
	"agent/session":    2,
	"agent/engine":     3,
	"redfish/host":     4,
	"redfish/firmware": 4,
	"redfish/client":   4,
	"agent/export":     4,
	"cmd":              5,
	"images":           5,
	"tests":            6,
	"cmd/backdoor":     7, // mounts the lab's verbs
	"redfish/internal": 0,
}

// sideways lists the imports between packages of one floor that are part of the design.
var sideways = map[[2]string]bool{
	{"agent/heal", "agent/detect"}:        true,
	{"redfish/service", "redfish/schema"}: true,
	{"redfish/oem", "redfish/schema"}:     true,
	{"agent/policy", "agent/detect"}:      true,
	{"agent/query", "agent/detect"}:       true,
}

// owners gives each heavy dependency its only importer outside tests.
var owners = map[string][]string{
	"cel.dev/cel-go":                      {"agent/policy"},
	"github.com/bmc-toolbox/bmclib":       {"cmd/internal/hostpower"},
	"github.com/cilium/ebpf/btf":          {"agent/kernel"},
	"github.com/ulikunitz/xz":             {"images", "agent/kernel/isf"},
	"github.com/cilium/ebpf/link":         {"nicfw/datapath", "nicfw/roce/afxdp"},
	"github.com/cilium/ebpf/rlimit":       {"nicfw/roce/afxdp"},
	"github.com/google/go-tpm":            {"boot"},
	"github.com/u-root/":                  {"boot", "cmd", "images", "tests"},
	"github.com/klauspost/compress":       {"nicfw/hostmem", "images", "boot", "agent/dump"},
	"github.com/stmcginnis/gofish":        {},
	"github.com/cilium/ebpf/asm":          {"nicfw/datapath", "nicfw/roce/afxdp"},
	"github.com/google/go-cmp":            {},
	"github.com/vishvananda/netlink":      {"boot", "nicfw/datapath", "nicfw/roce/afxdp", "tests/forward", "tests/rxe"},
	"github.com/insomniacslk/dhcp":        {"boot"},
	"github.com/bmc-toolbox/common":       {"cmd/internal/hostpower"},
	"golang.org/x/crypto/argon2":          {"redfish/service"},
	"github.com/secure-systems-lab/":      {}, // checks envelopes in a test
	"golang.org/x/crypto/ssh":             {"cmd/backdoor"},
	"github.com/jacobweinstock/registrar": {"cmd/internal/hostpower"},
}

type listed struct {
	ImportPath string
	Name       string
	Imports    []string
	Deps       []string
}

func list(t *testing.T, patterns ...string) []listed {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Name,Imports,Deps"}, patterns...)...)
	cmd.Dir = ".."
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list %v: %v\n%s", patterns, err, stderr.Bytes())
	}
	var all []listed
	dec := json.NewDecoder(bytes.NewReader(out))
	for {
		var p listed
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// tree returns the entry of layers that a package of this module belongs to, and its floor.
func tree(path string) (name string, floor int, ok bool) {
	rel, ours := strings.CutPrefix(path, module)
	if !ours {
		return "", 0, false
	}
	for prefix, n := range layers {
		if (rel == prefix || strings.HasPrefix(rel, prefix+"/")) && len(prefix) > len(name) {
			name, floor, ok = prefix, n, true
		}
	}
	return name, floor, ok
}

func TestImportsGoDown(t *testing.T) {
	for _, p := range list(t, "./...") {
		from, floor, ok := tree(p.ImportPath)
		if !ok {
			t.Errorf("%s: no floor in the table of layers; give it one", p.ImportPath)
			continue
		}
		for _, imp := range p.Imports {
			to, below, ok := tree(imp)
			if !ok || to == from {
				continue
			}
			if below > floor || below == floor && !sideways[[2]string{from, to}] {
				t.Errorf("%s (floor %d) imports %s (floor %d): imports go down only", p.ImportPath, floor, imp, below)
			}
		}
	}
}

func TestHeavyDependenciesHaveOneOwner(t *testing.T) {
	for _, p := range list(t, "./...") {
		rel := strings.TrimPrefix(p.ImportPath, module)
		for _, imp := range p.Imports {
			for dep, allowed := range owners {
				if imp != dep && !strings.HasPrefix(imp, strings.TrimSuffix(dep, "/")+"/") {
					continue
				}
				if !slices.ContainsFunc(allowed, func(o string) bool { return rel == o || strings.HasPrefix(rel, o+"/") }) {
					t.Errorf("%s imports %s, which belongs to %v", rel, imp, allowed)
				}
			}
		}
	}
}

func TestNetworkStaysOnTop(t *testing.T) {
	for _, p := range list(t, "./...") {
		name, floor, ok := tree(p.ImportPath)
		if !ok || floor >= 4 || name == "redfish/service" || strings.HasPrefix(name, "redfish") {
			continue
		}
		// boot asks for addresses by DHCP and modules by name; neither needs HTTP of ours, but u-root's packages may link it.
		if name == "boot" {
			if slices.Contains(p.Imports, "net/http") {
				t.Errorf("%s imports net/http, which belongs to the services", p.ImportPath)
			}
			continue
		}
		if slices.Contains(p.Deps, "net/http") {
			t.Errorf("%s depends on net/http, which belongs to the services", p.ImportPath)
		}
	}
}

func TestNoTestingInBinaries(t *testing.T) {
	for _, p := range list(t, "./...") {
		if p.Name == "main" && slices.Contains(p.Deps, "testing") {
			t.Errorf("%s links the package testing", p.ImportPath)
		}
	}
}

// The agent that serves RDMA to everybody is made by a build tag; without it nothing of that is in the program.
func TestReleaseServesNobodyWithoutALease(t *testing.T) {
	for _, p := range list(t, "./cmd/backdoord") {
		if slices.Contains(p.Deps, module+"nicfw/roce/interop") {
			t.Errorf("%s links the services of laboratories", p.ImportPath)
		}
	}
}
