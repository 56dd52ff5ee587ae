package service

import (
	"slices"
)

// The privileges of the Redfish specification (DSP0266, "Privilege model").
const (
	Login               = "Login"
	ConfigureManager    = "ConfigureManager"
	ConfigureUsers      = "ConfigureUsers"
	ConfigureComponents = "ConfigureComponents"
	ConfigureSelf       = "ConfigureSelf"
	NoAuth              = "NoAuth"
)

// Privileges say what a caller needs: all privileges of one of the lists. No list at all lets nobody in.
type Privileges [][]string

// operations are the privileges by HTTP method.
type operations map[string]Privileges

// mapping is one row of the privilege registry.
type mapping struct {
	operations  operations
	subordinate []override // for resources below certain others
	property    []override // for single properties
}

type override struct {
	targets    []string
	operations operations
}

// roles are the predefined roles of the specification. Their privileges cannot be changed.
var roles = []struct {
	id         string
	privileges []string
}{
	{"Administrator", []string{Login, ConfigureManager, ConfigureUsers, ConfigureComponents, ConfigureSelf}},
	{"Operator", []string{Login, ConfigureComponents, ConfigureSelf}},
	{"ReadOnly", []string{Login, ConfigureSelf}},
}

func rolePrivileges(id string) []string {
	for _, r := range roles {
		if r.id == id {
			return r.privileges
		}
	}
	return nil
}

// allows reports whether a caller with these privileges may pass. own says that the resource is the caller's own, which is
// what ConfigureSelf is about.
func (p Privileges) allows(have []string, own bool) bool {
	return slices.ContainsFunc(p, func(all []string) bool {
		for _, want := range all {
			if want == NoAuth {
				continue
			}
			if !slices.Contains(have, want) || want == ConfigureSelf && !own {
				return false
			}
		}
		return true
	})
}

// open reports whether nobody needs to be authenticated.
func (p Privileges) open() bool {
	return slices.ContainsFunc(p, func(all []string) bool { return slices.Equal(all, []string{NoAuth}) })
}

// privilegesOf works out the operations' privileges of an entity below the given ancestors (their entities, from the root on).
// An entity that the registry does not have, an OEM one, is treated as part of a computer system.
func privilegesOf(entity string, ancestors []string) operations {
	m, ok := privilegeTable[entity]
	if !ok {
		return privilegeTable["ComputerSystem"].operations
	}
	out := operations{}
	for method, p := range m.operations {
		out[method] = p
	}
	for _, o := range m.subordinate {
		if !subsequence(o.targets, ancestors) {
			continue
		}
		for method, p := range o.operations {
			out[method] = p
		}
		break
	}
	return out
}

// subsequence reports whether all of want occur in have, in this order.
func subsequence(want, have []string) bool {
	for _, h := range have {
		if len(want) > 0 && want[0] == h {
			want = want[1:]
		}
	}
	return len(want) == 0
}

// propertyPrivileges are the privileges that a PATCH of one property needs.
func propertyPrivileges(entity, property string, resource Privileges) Privileges {
	for _, o := range privilegeTable[entity].property {
		if slices.Contains(o.targets, property) {
			return o.operations["PATCH"]
		}
	}
	return resource
}
