package service

import (
	"slices"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

const (
	rolesURI = "/redfish/v1/AccountService/Roles"
	maxRoles = 16
)

// privileges returns all that a role may, its OEM privileges among them.
func (s *Service) privileges(id string) []string {
	assigned, oem, _ := s.role(id)
	if len(oem) == 0 {
		return assigned
	}
	return slices.Concat(assigned, oem)
}

// role returns the privileges of a role.
func (s *Service) role(id string) (assigned, oem []string, ok bool) {
	if p := rolePrivileges(id); p != nil {
		return p, s.o.OEMPrivileges[id], true
	}
	s.accounts.mu.RLock()
	defer s.accounts.mu.RUnlock()
	for _, r := range s.accounts.file.Roles {
		if r.ID == id {
			return r.Privileges, r.OEM, true
		}
	}
	return nil, nil, false
}

func (s *Service) roleIDs() (ids []string) {
	for _, r := range roles {
		ids = append(ids, r.id)
	}
	s.accounts.mu.RLock()
	defer s.accounts.mu.RUnlock()
	for _, r := range s.accounts.file.Roles {
		ids = append(ids, r.ID)
	}
	return ids
}

// oemPrivileges are those that roles of clients' making can have.
func (s *Service) oemPrivileges() []string {
	all := slices.Clone(s.o.MorePrivileges)
	for _, list := range s.o.OEMPrivileges {
		all = append(all, list...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// changeRoles changes the roles of clients' making by f.
func (a *accounts) changeRoles(f func([]role) ([]role, error)) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	next := a.file
	var err error
	if next.Roles, err = f(slices.Clone(next.Roles)); err != nil {
		return err
	}
	return a.store(next)
}

// grants refuses a caller who gives away privileges that it does not have, unless it administers users.
func (c Caller) grants(lists ...[]string) error {
	for _, list := range lists {
		for _, p := range list {
			if !c.may(p) && !c.may(ConfigureUsers) {
				return refuse(403, "InsufficientPrivilege")
			}
		}
	}
	return nil
}

func (s *Service) roleRoutes() []Route {
	standard := []string{Login, ConfigureManager, ConfigureUsers, ConfigureComponents, ConfigureSelf}
	properties := []Property{
		{Name: "AssignedPrivileges", Kind: StringArray, Values: standard},
		{Name: "OemPrivileges", Kind: StringArray, Allowed: func(*Request) []string { return append([]string{}, s.oemPrivileges()...) }},
	}
	sorted := func(list []string) []string {
		list = slices.Clone(list)
		slices.Sort(list)
		return slices.Compact(list)
	}
	restricted := func(id string) error {
		if rolePrivileges(id) != nil {
			return refuse(400, "RestrictedRole", id)
		}
		return nil
	}
	create := slices.Clone(properties)
	create[0].Required = true
	return []Route{
		{
			URI: rolesURI, Type: schema.TypeRoleCollection, Name: "Roles", Members: func(*Request) ([]string, error) { return s.roleIDs(), nil },
			Create: &Create{
				Properties: append(create, Property{Name: "RoleId", Kind: String, Required: true}),
				Do: func(r *Request, v Values) (string, *Reply, error) {
					id := v.String("RoleId")
					if !userName.MatchString(id) {
						return "", nil, refuse(400, "PropertyValueFormatError", id, "RoleId").about("RoleId")
					}
					n := role{ID: id, Privileges: sorted(v.Strings("AssignedPrivileges")), OEM: sorted(v.Strings("OemPrivileges"))}
					if err := r.Caller.grants(n.Privileges, n.OEM); err != nil {
						return "", nil, err
					}
					return id, nil, s.accounts.changeRoles(func(all []role) ([]role, error) {
						if rolePrivileges(id) != nil || slices.ContainsFunc(all, func(o role) bool { return o.ID == id }) {
							return nil, refuse(400, "ResourceAlreadyExists", "Role", "RoleId", id).about("RoleId")
						}
						if len(all) >= maxRoles {
							return nil, refuse(400, "CreateLimitReachedForResource")
						}
						return append(all, n), nil
					})
				},
			},
		},
		{
			URI: rolesURI + "/{role}", Type: schema.TypeRole,
			Get: func(r *Request) (schema.Object, error) {
				id := r.Param("role")
				assigned, oem, ok := s.role(id)
				if !ok {
					return nil, ErrNotFound
				}
				return &schema.Role{
					Resource: schema.Resource{Name: id + " Role"}, RoleID: id, IsPredefined: rolePrivileges(id) != nil, AssignedPrivileges: assigned, OEMPrivileges: oem,
				}, nil
			},
			Patch: &Patch{
				Properties: properties,
				Do: func(r *Request, v Values) error {
					id := r.Param("role")
					if err := restricted(id); err != nil {
						return err
					}
					if err := r.Caller.grants(v.Strings("AssignedPrivileges"), v.Strings("OemPrivileges")); err != nil {
						return err
					}
					return s.accounts.changeRoles(func(all []role) ([]role, error) {
						i := slices.IndexFunc(all, func(o role) bool { return o.ID == id })
						if i < 0 {
							return nil, ErrNotFound
						}
						if v.Has("AssignedPrivileges") {
							all[i].Privileges = sorted(v.Strings("AssignedPrivileges"))
						}
						if v.Has("OemPrivileges") {
							all[i].OEM = sorted(v.Strings("OemPrivileges"))
						}
						return all, nil
					})
				},
			},
			Delete: func(r *Request) error {
				id := r.Param("role")
				if err := restricted(id); err != nil {
					return err
				}
				return s.accounts.changeRoles(func(all []role) ([]role, error) {
					i := slices.IndexFunc(all, func(o role) bool { return o.ID == id })
					switch {
					case i < 0:
						return nil, ErrNotFound
					case slices.ContainsFunc(s.accounts.file.Accounts, func(c account) bool { return c.Role == id }):
						return nil, Because(400, "ResourceInUse", "There are accounts with this role.")
					}
					return slices.Delete(all, i, i+1), nil
				})
			},
		},
	}
}
