package service

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"

	"golang.org/x/crypto/argon2"

	"github.com/backdoor-rhs/backdoor/internal/durable"
	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// HashCost is the cost of Argon2id (RFC 9106) with one lane: memory in KiB, and passes over it.
type HashCost struct {
	Memory, Passes uint32
}

// usualHash is the cost by default: of those that OWASP's Password Storage Cheat Sheet calls equal (19 MiB and 2 passes, 12 and 3, 9 and 4, 7 and
// 5), the one with the least memory, which must fit beside everything else on a small machine.
var usualHash = HashCost{Memory: 7 << 10, Passes: 5}

const (
	minPassword = 8
	maxPassword = 128
	maxAccounts = 32
)

// account is one account as it is stored. Its Id never changes and is never used again.
type account struct {
	ID       string `json:"id"`
	User     string `json:"user"`
	Role     string `json:"role"`
	Hash     string `json:"hash"` // $argon2id$v=19$m=…,t=…,p=1$salt$hash
	Enabled  bool   `json:"enabled"`
	Change   bool   `json:"changePassword"`
	Initial  bool   `json:"initial"` // the password is the one that New made and announced
	Revision int    `json:"revision"`
}

// accountFile is accounts.json in the state directory.
type accountFile struct {
	Version  int       `json:"version"` // 1
	Next     int       `json:"next"`    // the next Id
	Accounts []account `json:"accounts"`
	Roles    []role    `json:"roles,omitempty"` // of clients' making
}

// role is a role of a client's making.
type role struct {
	ID         string   `json:"id"`
	Privileges []string `json:"privileges"`
	OEM        []string `json:"oemPrivileges,omitempty"`
}

// accounts is the store of accounts.
type accounts struct {
	path string // "" keeps them in memory
	cost HashCost
	hash chan struct{} // bounds the hashes worked out at a time, each of which takes memory and a CPU
	fake string        // hash that is checked for users who do not exist, so that the time does not tell

	mu    sync.RWMutex // guards what follows
	file  accountFile
	epoch int // counts changes; cached logins of an older one are void
}

func openAccounts(s *Service) (*accounts, error) {
	a := &accounts{cost: s.limits.Hash, hash: make(chan struct{}, 1), file: accountFile{Version: 1, Next: 1}}
	if s.o.StateDir != "" {
		a.path = s.path("accounts.json")
		b, err := os.ReadFile(a.path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return nil, fmt.Errorf("read accounts: %w", err)
		default:
			dec := json.NewDecoder(strings.NewReader(string(b)))
			dec.DisallowUnknownFields()
			if err := dec.Decode(&a.file); err != nil {
				return nil, fmt.Errorf("read accounts in %s: %w", a.path, err)
			}
			if a.file.Version != 1 {
				return nil, fmt.Errorf("read accounts in %s: version %d is not known", a.path, a.file.Version)
			}
		}
	}
	// No password is known to have this hash; comparing with it takes as long as with any other.
	var noSum [32]byte
	rand.Read(noSum[:])
	a.fake = a.encode(noSum[:16], noSum[:])

	initial := slices.IndexFunc(a.file.Accounts, func(c account) bool { return c.Initial })
	switch {
	case len(a.file.Accounts) == 0 && s.o.Account != nil:
		c := account{User: s.o.Account.User, Role: "Administrator", Enabled: true}
		if _, err := a.create(c, s.o.Account.Password); err != nil {
			return nil, fmt.Errorf("make the given account: %w", err)
		}
	case len(a.file.Accounts) == 0:
		password := randomPassword()
		if _, err := a.create(account{User: "admin", Role: "Administrator", Enabled: true, Change: true, Initial: true}, password); err != nil {
			return nil, fmt.Errorf("make the first account: %w", err)
		}
		s.announce("admin", password)
	case initial >= 0:
		// Only the hash was kept: whoever missed the announcement gets a new one.
		c := a.file.Accounts[initial]
		password := randomPassword()
		hash := a.digest(password)
		if _, err := a.update(c.ID, func(c *account) error { c.Hash = hash; return nil }); err != nil {
			return nil, fmt.Errorf("renew the first password: %w", err)
		}
		s.announce(c.User, password)
	}
	return a, nil
}

func (s *Service) announce(user, password string) {
	if s.o.Announce != nil {
		s.o.Announce(Credential{User: user, Password: password})
		return
	}
	s.log.Warn("a first password was made, but nothing is set up to announce it", "user", user)
}

// randomPassword returns a password that is read from a console and typed without mistakes: 80 bits in groups of four, without
// characters that look alike.
func randomPassword() string {
	const alphabet = "abcdefghjkmnpqrstuvwxyz23456789-"
	var raw [16]byte
	rand.Read(raw[:])
	var out strings.Builder
	for i, b := range raw {
		if i > 0 && i%4 == 0 {
			out.WriteByte('-')
		}
		out.WriteByte(alphabet[int(b)%31])
	}
	return out.String()
}

// randomText returns n random bytes in URL-safe base64.
func randomText(n int) string {
	raw := make([]byte, n)
	rand.Read(raw)
	return base64.RawURLEncoding.EncodeToString(raw)
}

// digest hashes a password with a new salt.
func (a *accounts) digest(password string) string {
	a.hash <- struct{}{}
	defer func() { <-a.hash }()
	var salt [16]byte
	rand.Read(salt[:])
	return a.encode(salt[:], argon2.IDKey([]byte(password), salt[:], a.cost.Passes, a.cost.Memory, 1, 32))
}

// encode writes a hash as it is stored.
func (a *accounts) encode(salt, sum []byte) string {
	enc := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=19$m=%d,t=%d,p=1$%s$%s", a.cost.Memory, a.cost.Passes, enc.EncodeToString(salt), enc.EncodeToString(sum))
}

// matches checks a password against a stored hash, in the same time whatever the answer. A damaged hash matches nothing.
func (a *accounts) matches(hash, password string) bool {
	a.hash <- struct{}{}
	defer func() { <-a.hash }()
	parts := strings.Split(hash, "$")
	if len(parts) != 6 || parts[1] != "argon2id" {
		return false
	}
	var memory, passes uint32
	if _, err := fmt.Sscanf(parts[3], "m=%d,t=%d,p=1", &memory, &passes); err != nil || passes == 0 || passes > 64 || memory > 1<<20 {
		return false
	}
	salt, err1 := base64.RawStdEncoding.DecodeString(parts[4])
	want, err2 := base64.RawStdEncoding.DecodeString(parts[5])
	if err1 != nil || err2 != nil || len(want) == 0 {
		return false
	}
	got := argon2.IDKey([]byte(password), salt, passes, memory, 1, uint32(len(want)))
	return subtle.ConstantTimeCompare(got, want) == 1
}

// list returns all accounts.
func (a *accounts) list() []account {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return slices.Clone(a.file.Accounts)
}

// get returns the account with an Id.
func (a *accounts) get(id string) (account, bool) {
	return a.find(func(c account) bool { return c.ID == id })
}

// byUser returns the account of a user.
func (a *accounts) byUser(user string) (account, bool) {
	return a.find(func(c account) bool { return c.User == user })
}

func (a *accounts) find(f func(account) bool) (account, bool) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if i := slices.IndexFunc(a.file.Accounts, f); i >= 0 {
		return a.file.Accounts[i], true
	}
	return account{}, false
}

// generation returns the number of changes so far.
func (a *accounts) generation() int {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.epoch
}

var userName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$`)

func checkUser(user string) *Error {
	if !userName.MatchString(user) {
		return refuse(400, "PropertyValueFormatError", user, "UserName").about("UserName")
	}
	return nil
}

func checkPassword(user, password string) *Error {
	if len(password) < minPassword || len(password) > maxPassword {
		return Because(400, "PasswordIncorrectLength", fmt.Sprintf("The password must have %d to %d characters.", minPassword, maxPassword)).about("Password")
	}
	if strings.EqualFold(user, password) {
		return Because(400, "PasswordComplexityNotMet", "The password must not be the user name.").about("Password")
	}
	return nil
}

// create adds an account and returns its Id. The labs' given passwords are taken as they are.
func (a *accounts) create(c account, password string) (string, error) {
	c.Hash = a.digest(password)
	a.mu.Lock()
	defer a.mu.Unlock()
	if slices.ContainsFunc(a.file.Accounts, func(o account) bool { return o.User == c.User }) {
		return "", refuse(400, "ResourceAlreadyExists", "ManagerAccount", "UserName", c.User).about("UserName")
	}
	if len(a.file.Accounts) >= maxAccounts {
		return "", refuse(400, "CreateLimitReachedForResource")
	}
	next := a.file
	c.ID = fmt.Sprint(next.Next)
	next.Next++
	next.Accounts = append(slices.Clone(next.Accounts), c)
	return c.ID, a.store(next)
}

// update changes an account by f, which sees a copy. It never leaves the service without an administrator who can log in.
func (a *accounts) update(id string, f func(*account) error) (account, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	next := a.file
	next.Accounts = slices.Clone(next.Accounts)
	i := slices.IndexFunc(next.Accounts, func(c account) bool { return c.ID == id })
	if i < 0 {
		return account{}, ErrNotFound
	}
	c := &next.Accounts[i]
	if err := f(c); err != nil {
		return account{}, err
	}
	c.Revision++
	if slices.ContainsFunc(next.Accounts, func(o account) bool { return o.ID != id && o.User == c.User }) {
		return account{}, refuse(400, "ResourceAlreadyExists", "ManagerAccount", "UserName", c.User).about("UserName")
	}
	if !administered(next.Accounts) {
		return account{}, Because(400, "RestrictedRole", "The last enabled administrator cannot be disabled or given another role.", "Administrator")
	}
	return *c, a.store(next)
}

// remove deletes an account.
func (a *accounts) remove(id string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	next := a.file
	next.Accounts = slices.DeleteFunc(slices.Clone(next.Accounts), func(c account) bool { return c.ID == id })
	if len(next.Accounts) == len(a.file.Accounts) {
		return ErrNotFound
	}
	if !administered(next.Accounts) {
		return Because(400, "ResourceCannotBeDeleted", "The last enabled administrator cannot be deleted.")
	}
	return a.store(next)
}

func administered(all []account) bool {
	return slices.ContainsFunc(all, func(c account) bool { return c.Enabled && c.Role == "Administrator" })
}

// store makes next the present state, on disk first. The caller holds mu.
func (a *accounts) store(next accountFile) error {
	if a.path != "" {
		b, err := json.MarshalIndent(next, "", "\t")
		if err != nil {
			return fmt.Errorf("store accounts: %w", err)
		}
		if err := durable.WriteFile(a.path, b, 0o600); err != nil {
			return fmt.Errorf("store accounts: %w", err)
		}
	}
	a.file = next
	a.epoch++
	return nil
}

const accountsURI = "/redfish/v1/AccountService/Accounts"

func (s *Service) accountRoutes() []Route {
	view := func(c account) *schema.ManagerAccount {
		return &schema.ManagerAccount{
			Resource: schema.Resource{ID: c.ID, Name: "User Account", ODataETag: fmt.Sprintf(`W/"%s.%d"`, c.ID, c.Revision)},
			UserName: c.User, RoleID: c.Role, Enabled: c.Enabled, PasswordChangeRequired: c.Change, AccountTypes: []string{"Redfish"},
			Links: &schema.AccountLinks{Role: schema.LinkTo(rolesURI + "/" + c.Role)},
		}
	}
	roleIDs := func(*Request) []string { return s.roleIDs() }
	text := func(name string) Property { return Property{Name: name, Kind: String} }
	return []Route{
		{
			URI:  "/redfish/v1/AccountService",
			Type: schema.TypeAccountService,
			Get: func(*Request) (schema.Object, error) {
				return &schema.AccountService{
					Resource: schema.Resource{Name: "Account Service"}, ServiceEnabled: true,
					MinPasswordLength: minPassword, MaxPasswordLength: maxPassword,
					AccountLockoutThreshold: s.limits.LockAfter, AccountLockoutDuration: int(s.limits.LockTime.Seconds()),
					AccountLockoutCounterResetAfter: int(s.limits.LockTime.Seconds()),
					MultiFactorAuth:                 s.multiFactor(),
					HTTPBasicAuth:                   "Enabled", SupportedAccountTypes: []string{"Redfish"},
					Status:   &schema.Status{State: schema.StateEnabled, Health: schema.HealthOK},
					Accounts: schema.LinkTo(accountsURI), Roles: schema.LinkTo(rolesURI),
				}, nil
			},
			Patch: &Patch{
				Properties: []Property{
					{Name: "MultiFactorAuth/ClientCertificate/Enabled", Kind: Boolean},
					{Name: "MultiFactorAuth/ClientCertificate/RespondToUnauthenticatedClients", Kind: Boolean},
					{Name: "MultiFactorAuth/ClientCertificate/CertificateMappingAttribute", Kind: String, Values: []string{"CommonName"}},
				},
				Do: s.certs.setClients,
			},
		},
		{
			URI: accountsURI, Type: schema.TypeManagerAccountCollection, Name: "Accounts",
			Members: func(r *Request) (ids []string, err error) {
				for _, c := range s.accounts.list() {
					// Who may not see others' accounts is not told of them either.
					if c.User == r.Caller.User || r.Caller.may(ConfigureUsers) || r.Caller.may(ConfigureManager) {
						ids = append(ids, c.ID)
					}
				}
				return ids, nil
			},
			Create: &Create{
				Properties: []Property{
					{Name: "UserName", Kind: String, Required: true}, {Name: "Password", Kind: String, Required: true},
					{Name: "RoleId", Kind: String, Required: true, Allowed: roleIDs}, {Name: "Enabled", Kind: Boolean},
					{Name: "PasswordChangeRequired", Kind: Boolean}, {Name: "AccountTypes", Kind: StringArray, Values: []string{"Redfish"}},
				},
				Do: func(r *Request, v Values) (string, *Reply, error) {
					user, password := v.String("UserName"), v.String("Password")
					for _, e := range []*Error{checkUser(user), checkPassword(user, password)} {
						if e != nil {
							return "", nil, e
						}
					}
					c := account{User: user, Role: v.String("RoleId"), Enabled: !v.Has("Enabled") || v.Bool("Enabled"), Change: v.Bool("PasswordChangeRequired")}
					id, err := s.accounts.create(c, password)
					return id, nil, err
				},
			},
		},
		{
			URI: accountsURI + "/{account}", Type: schema.TypeManagerAccount,
			Get: func(r *Request) (schema.Object, error) {
				c, ok := s.accounts.get(r.Param("account"))
				if !ok {
					return nil, ErrNotFound
				}
				out := view(c)
				out.Locked = s.logins.locked(c.User)
				return out, nil
			},
			Patch: &Patch{
				Properties: []Property{
					text("UserName"), text("Password"), {Name: "RoleId", Kind: String, Allowed: roleIDs}, {Name: "Enabled", Kind: Boolean},
					{Name: "PasswordChangeRequired", Kind: Boolean}, {Name: "Locked", Kind: Boolean}, {Name: "AccountTypes", Kind: StringArray, Values: []string{"Redfish"}},
				},
				Do: func(r *Request, v Values) error { return s.changeAccount(r, v) },
			},
			Delete: func(r *Request) error {
				c, ok := s.accounts.get(r.Param("account"))
				if !ok {
					return ErrNotFound
				}
				if err := s.accounts.remove(c.ID); err != nil {
					return err
				}
				s.sessions.endUser(c.User, "")
				return nil
			},
		},
	}
}

// changeAccount carries out a PATCH of an account.
func (s *Service) changeAccount(r *Request, v Values) error {
	before, ok := s.accounts.get(r.Param("account"))
	if !ok {
		return ErrNotFound
	}
	user := before.User
	if v.Has("UserName") {
		user = v.String("UserName")
		if e := checkUser(user); e != nil {
			return e
		}
	}
	if v.Bool("Locked") {
		return refuse(400, "PropertyValueError", "Locked").about("Locked") // only false can be written
	}
	hash := ""
	if v.Has("Password") {
		if e := checkPassword(user, v.String("Password")); e != nil {
			return e
		}
		// A first password must really change, not only be set again.
		if before.Change && s.accounts.matches(before.Hash, v.String("Password")) {
			return Because(400, "PasswordComplexityNotMet", "The new password must differ from the one that is to be changed.").about("Password")
		}
		hash = s.accounts.digest(v.String("Password"))
	}
	after, err := s.accounts.update(before.ID, func(c *account) error {
		c.User = user
		if v.Has("RoleId") {
			c.Role = v.String("RoleId")
		}
		if v.Has("Enabled") {
			c.Enabled = v.Bool("Enabled")
		}
		if hash != "" {
			c.Hash, c.Change, c.Initial = hash, false, false
		}
		if v.Has("PasswordChangeRequired") {
			c.Change = v.Bool("PasswordChangeRequired")
		}
		return nil
	})
	if err != nil {
		return err
	}
	if v.Has("Locked") {
		s.logins.unlock(before.User)
	}
	switch {
	case after.User != before.User || !after.Enabled:
		s.sessions.endUser(before.User, "")
	case hash != "":
		s.sessions.endUser(before.User, r.Caller.Session) // others that know only the old password are out
	}
	return nil
}
