package bundle

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// testKey is a key made from a name.
func testKey(name string) ed25519.PrivateKey {
	seed := make([]byte, ed25519.SeedSize)
	copy(seed, name)
	return ed25519.NewKeyFromSeed(seed)
}

func keyOf(k ed25519.PrivateKey) Key {
	public := k.Public().(ed25519.PublicKey)
	return Key{ID: KeyID(public), Public: public}
}

var (
	released = time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	expires  = time.Date(2027, 11, 1, 0, 0, 0, 0, time.UTC)
	today    = time.Date(2026, 12, 24, 18, 0, 0, 0, time.UTC)
)

// testRoot is a key set; two of three keys of the role root, one of one of the role release.
func testRoot(version uint32, root []string, threshold int, release []string, releaseThreshold int) Root {
	r := Root{Format: 1, Version: version, Expires: expires, Root: Role{Threshold: threshold}, Release: Role{Threshold: releaseThreshold}}
	add := func(role *Role, names []string) {
		for _, n := range names {
			k := keyOf(testKey(n))
			role.Keys = append(role.Keys, k.ID)
			if r.key(k.ID) == nil {
				r.Keys = append(r.Keys, k)
			}
		}
	}
	add(&r.Root, root)
	add(&r.Release, release)
	return r
}

func sign(t testing.TB, e Envelope, err error, names ...string) Envelope {
	t.Helper()
	for _, n := range names {
		if err == nil {
			err = e.Sign(testKey(n))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func testManifest() Manifest {
	return Manifest{
		Format: 1, Product: "backdoor", Machine: "dpu-arm64", Version: "1.4.0", Epoch: 3, Released: released, Expires: expires, MinLoader: 1,
		CommandLine: "console=ttyAMA0 quiet", Notes: map[string]string{"builder": "a <test> & more"},
	}
}

func testParts(sizes ...int) []Content {
	names := []string{PartKernel, PartInitramfs, PartDTB}
	var parts []Content
	for i, n := range sizes {
		b := make([]byte, n)
		rng := rand.New(rand.NewPCG(1, uint64(i)))
		for j := range b {
			b[j] = byte(rng.Uint32())
		}
		parts = append(parts, Content{Name: names[i], From: bytes.NewReader(b), Size: int64(n)})
	}
	return parts
}

// testBundle makes a bundle under two key sets, of which the second shares one key with the first.
func testBundle(t testing.TB, m Manifest, parts []Content) (b []byte, first, second Root) {
	t.Helper()
	first = testRoot(1, []string{"anna", "bert", "carl"}, 2, []string{"rel1"}, 1)
	second = testRoot(2, []string{"anna", "dora", "emil"}, 2, []string{"rel1", "rel2"}, 2)
	e1, err := NewRoot(first)
	e1 = sign(t, e1, err, "anna", "carl")
	e2, err := NewRoot(second)
	e2 = sign(t, e2, err, "anna", "carl", "dora")
	man, err := Describe(m, parts)
	man = sign(t, man, err, "rel1", "rel2")
	var out bytes.Buffer
	if err := Write(&out, []Envelope{e1, e2}, man, parts); err != nil {
		t.Fatal(err)
	}
	return out.Bytes(), first, second
}

func testPolicy(r Root) Policy {
	return Policy{Root: r, MinEpoch: 3, Product: "backdoor", Machine: "dpu-arm64", Loader: 1, Now: today, MaxSize: 1 << 30}
}

// through reads a bundle to its end.
func through(b io.Reader, p Policy) ([]byte, error) {
	r, err := NewReader(b, p)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}

func reason(err error) Reason {
	var e *RefusedError
	if errors.As(err, &e) {
		return e.Reason
	}
	return ""
}

func TestRoundTrip(t *testing.T) {
	parts := testParts(5000, 4096, 1)
	b, first, second := testBundle(t, testManifest(), parts)
	for _, root := range []Root{first, second} {
		for name, in := range map[string]io.Reader{
			"whole": bytes.NewReader(b), "by bytes": iotest.OneByteReader(bytes.NewReader(b)), "end with data": iotest.DataErrReader(bytes.NewReader(b)),
		} {
			got, err := through(in, testPolicy(root))
			if err != nil || !bytes.Equal(got, b) {
				t.Errorf("read %s under key set %d: %d bytes, %v; want the %d that were written", name, root.Version, len(got), err, len(b))
			}
		}
	}
	img, err := OpenAt(bytes.NewReader(append(b, "what lay in the slot before"...)), testPolicy(first))
	if err != nil {
		t.Fatal(err)
	}
	if img.Size() != int64(len(b)) || img.Root.Version != 2 || len(img.Signers) != 2 || img.Manifest.Version != "1.4.0" {
		t.Errorf("image: %d bytes, key set %d, signers %v", img.Size(), img.Root.Version, img.Signers)
	}
	if err := img.Verify(); err != nil {
		t.Errorf("Verify: %v", err)
	}
	for _, c := range parts {
		want := make([]byte, c.Size)
		_, _ = c.From.ReadAt(want, 0)
		if n := img.PartSize(c.Name); n != c.Size {
			t.Errorf("PartSize(%s) = %d; want %d", c.Name, n, c.Size)
		}
		for _, room := range []int64{c.Size, c.Size + 1, padded(c.Size), padded(c.Size) + 1} {
			whole := bytes.Repeat([]byte{0xee}, int(room))
			got := whole[:c.Size]
			if err := img.ReadPart(got, c.Name); err != nil || !bytes.Equal(got, want) {
				t.Errorf("ReadPart(%s) into %d bytes of room: %v", c.Name, room, err)
			}
			for i, v := range whole[c.Size:] {
				if inside := room >= padded(c.Size) && c.Size+int64(i) < padded(c.Size); inside && v != 0 || !inside && v != 0xee {
					t.Errorf("ReadPart(%s) into %d bytes of room: byte %d behind it is %#x", c.Name, room, i, v)
				}
			}
		}
		if err := img.ReadPart(make([]byte, c.Size+1), c.Name); err == nil {
			t.Errorf("ReadPart(%s) with a byte too much: no error", c.Name)
		}
		off, ok := img.Offset(c.Name)
		if !ok || off%BlockSize != 0 || !bytes.Equal(b[off:off+c.Size], want) {
			t.Errorf("Offset(%s) = %d, %t", c.Name, off, ok)
		}
	}
	if err := img.ReadPart(nil, "nothing"); err == nil {
		t.Error("a part that is not there was read")
	}
	roots, man, m, contents, err := Read(bytes.NewReader(b))
	if err != nil || len(roots) != 2 || len(man.Signatures) != 2 || m.Epoch != 3 || len(contents) != 3 {
		t.Errorf("Read: %d key sets, %d signatures, %d parts, %v", len(roots), len(man.Signatures), len(contents), err)
	}
}

// TestTamperedByte changes each byte of the head, and many of the parts, in two ways.
func TestTamperedByte(t *testing.T) {
	b, first, _ := testBundle(t, testManifest(), testParts(5000, 700))
	p := testPolicy(first)
	at := func(i int, flip byte) {
		bad := bytes.Clone(b)
		bad[i] ^= flip
		if _, err := through(bytes.NewReader(bad), p); reason(err) == "" {
			t.Fatalf("byte %d of %d changed by %#x: %v; want it refused", i, len(b), flip, err)
		}
	}
	step := 1
	if testing.Short() {
		step = 29 // each byte is tried in long runs
	}
	for i := 0; i < len(b); i += step {
		at(i, 0x20) // another case, where it is a letter
		if i%5 == 0 {
			at(i, 1<<(i%8))
		}
	}
}

func TestTruncated(t *testing.T) {
	b, first, _ := testBundle(t, testManifest(), testParts(5000, 700))
	for n := 0; n < len(b); n += 1 + n/100 {
		if _, err := through(bytes.NewReader(b[:n]), testPolicy(first)); reason(err) != Truncated {
			t.Fatalf("the first %d of %d bytes: %v; want %s", n, len(b), err, Truncated)
		}
	}
	broken := errors.New("the wire broke")
	for _, n := range []int{3, 100, 9000, len(b)} {
		if _, err := through(io.MultiReader(bytes.NewReader(b[:n]), iotest.ErrReader(broken)), testPolicy(first)); !errors.Is(err, broken) {
			t.Errorf("a reader that fails after %d bytes: %v; want its error", n, err)
		}
	}
}

func TestRefusals(t *testing.T) {
	good, first, second := testBundle(t, testManifest(), testParts(5000, 700))
	stranger := testRoot(1, []string{"mallory"}, 1, []string{"mallory"}, 1)
	remake := func(change func(m *Manifest, man *Envelope, roots *[]Envelope)) []byte {
		roots, _, m, parts, err := Read(bytes.NewReader(good))
		if err != nil {
			t.Fatal(err)
		}
		change(&m, nil, nil)
		man, err := Describe(m, parts)
		man = sign(t, man, err, "rel1", "rel2")
		change(&m, &man, &roots)
		var out bytes.Buffer
		if err := Write(&out, roots, man, parts); err != nil {
			t.Fatal(err)
		}
		return out.Bytes()
	}
	signed := func(f func(man *Envelope, roots *[]Envelope)) []byte {
		return remake(func(_ *Manifest, man *Envelope, roots *[]Envelope) {
			if man != nil {
				f(man, roots)
			}
		})
	}
	self, err := NewRoot(stranger)
	self = sign(t, self, err, "mallory")
	third := func(names ...string) Envelope {
		e, err := NewRoot(testRoot(3, []string{"fred"}, 1, []string{"rel1"}, 1))
		return sign(t, e, err, names...)
	}
	newer := bytes.Clone(good)
	newer[7] = 2
	for name, tc := range map[string]struct {
		bundle []byte
		policy func(*Policy)
		want   Reason
	}{
		"good":              {good, func(*Policy) {}, ""},
		"not a bundle":      {[]byte("PK\x03\x04 and so on, and on, and on"), nil, NotBundle},
		"newer format":      {newer, nil, NotBundle},
		"one byte more":     {append(bytes.Clone(good), 0), nil, TooLong},
		"expired":           {good, func(p *Policy) { p.Now = expires.Add(time.Second) }, Expired},
		"clock not asked":   {good, func(p *Policy) { p.Now = time.Time{} }, ""},
		"older epoch":       {good, func(p *Policy) { p.MinEpoch = 4 }, TooOld},
		"older key set":     {good, func(p *Policy) { p.MinRoot = 3 }, TooOld},
		"wrong product":     {good, func(p *Policy) { p.Product = "frontdoor" }, WrongProduct},
		"wrong machine":     {good, func(p *Policy) { p.Machine = "bmc-armv7" }, WrongMachine},
		"old loader":        {remake(func(m *Manifest, _ *Envelope, _ *[]Envelope) { m.MinLoader = 2 }), nil, LoaderTooOld},
		"no room":           {good, func(p *Policy) { p.MaxSize = int64(len(good)) - 1 }, TooLarge},
		"room":              {good, func(p *Policy) { p.MaxSize = int64(len(good)) }, ""},
		"stranger's device": {good, func(p *Policy) { p.Root = stranger }, BadSignature},
		"stranger's bundle": {signed(func(man *Envelope, roots *[]Envelope) {
			*roots = []Envelope{self}
			man.Signatures = nil
			_ = man.Sign(testKey("mallory"))
		}), nil, BadSignature},
		"one signature of two":     {signed(func(man *Envelope, _ *[]Envelope) { man.Signatures = man.Signatures[:1] }), nil, BadSignature},
		"none":                     {signed(func(man *Envelope, _ *[]Envelope) { man.Signatures = nil }), nil, BadSignature},
		"one twice":                {signed(func(man *Envelope, _ *[]Envelope) { man.Signatures[1] = man.Signatures[0] }), nil, BadSignature},
		"root's key for release":   {signed(func(man *Envelope, _ *[]Envelope) { man.Signatures = man.Signatures[:1]; _ = man.Sign(testKey("anna")) }), nil, BadSignature},
		"rotated-out set's keys":   {signed(func(man *Envelope, roots *[]Envelope) { *roots = (*roots)[:1]; man.Signatures = man.Signatures[:1] }), func(p *Policy) { p.Root = second }, BadSignature},
		"set of its own":           {signed(func(_ *Envelope, roots *[]Envelope) { *roots = append(*roots, third("fred")) }), nil, BadSignature},
		"set signed by one of two": {signed(func(_ *Envelope, roots *[]Envelope) { *roots = append(*roots, third("fred", "dora")) }), nil, BadSignature},
		"set left out":             {signed(func(_ *Envelope, roots *[]Envelope) { *roots = append((*roots)[:1:1], third("fred", "anna", "dora")) }), nil, BadSignature},
		"no set":                   {signed(func(_ *Envelope, roots *[]Envelope) { *roots = nil }), nil, BadSignature},
		"another first set":        {signed(func(_ *Envelope, roots *[]Envelope) { (*roots)[0] = self }), nil, BadSignature},
		"a set as manifest":        {signed(func(man *Envelope, roots *[]Envelope) { *man = (*roots)[0] }), nil, BadSignature},
	} {
		p := testPolicy(first)
		if tc.policy != nil {
			tc.policy(&p)
		}
		_, err := through(bytes.NewReader(tc.bundle), p)
		if got := reason(err); got != tc.want || tc.want == "" && err != nil {
			t.Errorf("%s: %v; want %q", name, err, tc.want)
		}
	}
}

// bigPart is a part that costs no memory.
type bigPart struct{}

func (bigPart) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		p[i] = byte((off + int64(i)) >> 9)
	}
	return len(p), nil
}

func TestConstantMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("256 MiB are left out of short runs")
	}
	parts := append(testParts(4096), Content{Name: PartInitramfs, From: bigPart{}, Size: 256 << 20})
	m := testManifest()
	first := testRoot(1, []string{"anna"}, 1, []string{"rel1"}, 1)
	e, err := NewRoot(first)
	e = sign(t, e, err, "anna")
	man, err := Describe(m, parts)
	man = sign(t, man, err, "rel1")
	in, out := io.Pipe()
	go func() { out.CloseWithError(Write(out, []Envelope{e}, man, parts)) }()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	r, err := NewReader(in, testPolicy(first))
	if err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, r)
	runtime.ReadMemStats(&after)
	if err != nil || n != r.Size() {
		t.Fatalf("read %d of %d bytes: %v", n, r.Size(), err)
	}
	if used := after.TotalAlloc - before.TotalAlloc; used > 2<<20 {
		t.Errorf("%d bytes were allocated for a bundle of %d", used, n)
	}
}

func TestManifestBounds(t *testing.T) {
	for name, change := range map[string]func(*Manifest){
		"format":          func(m *Manifest) { m.Format = 2 },
		"product":         func(m *Manifest) { m.Product = "../x" },
		"machine":         func(m *Manifest) { m.Machine = "" },
		"version":         func(m *Manifest) { m.Version = "1 0" },
		"epoch":           func(m *Manifest) { m.Epoch = 0 },
		"fractions":       func(m *Manifest) { m.Released = m.Released.Add(1) },
		"zone":            func(m *Manifest) { m.Expires = m.Expires.In(time.FixedZone("x", 3600)) },
		"expires first":   func(m *Manifest) { m.Expires = m.Released },
		"command line":    func(m *Manifest) { m.CommandLine = strings.Repeat("x", 897) },
		"control":         func(m *Manifest) { m.CommandLine = "a\nb" },
		"notes":           func(m *Manifest) { m.Notes = map[string]string{"x": strings.Repeat("y", 513)} },
		"name of a part":  func(m *Manifest) { m.Parts[1].Name = "/etc/passwd" },
		"part twice":      func(m *Manifest) { m.Parts[1].Name = PartKernel },
		"part too large":  func(m *Manifest) { m.Parts[0].Size = 1 << 62 },
		"part of nothing": func(m *Manifest) { m.Parts[0].Size = 0 },
		"hash":            func(m *Manifest) { m.Parts[0].SHA256 = strings.ToUpper(m.Parts[0].SHA256) },
		"no initramfs":    func(m *Manifest) { m.Parts = m.Parts[:1] },
	} {
		m := testManifest()
		for i, n := range []string{PartKernel, PartInitramfs} {
			m.Parts = append(m.Parts, Part{Name: n, Size: 1, SHA256: strings.Repeat("ab", 31) + fmt.Sprintf("%02x", 0xc0+i)})
		}
		if err := m.Validate(); err != nil {
			t.Fatalf("the good one: %v", err)
		}
		change(&m)
		if m.Validate() == nil {
			t.Errorf("%s: it was not noticed", name)
		}
	}
}

func TestCompareVersions(t *testing.T) {
	ordered := []string{"0.9", "1.0.0", "1.0.2", "1.0.10", "1.0.10-rc1", "1.10", "2", "v1", "v1.2", "v1.10"}
	for i, a := range ordered {
		for j, b := range ordered {
			want := 0
			if i < j {
				want = -1
			} else if i > j {
				want = 1
			}
			if got := CompareVersions(a, b); got != want {
				t.Errorf("CompareVersions(%q, %q) = %d; want %d", a, b, got, want)
			}
		}
	}
}

// FuzzReader reads damaged bundles as a stream and in place: both take the same ones, and only whole ones.
func FuzzReader(f *testing.F) {
	b, first, _ := testBundle(f, testManifest(), testParts(300, 20))
	f.Add(b)
	f.Add(b[:len(b)-1])
	f.Add(append([]byte("\x89BDU\r\n\x00\x01\xff\xff\xff\xff\x00\x00\x00\x00"), b[16:]...))
	f.Add([]byte("\x89BDU\r\n\x00\x01\x20\x00\x00\x00\x00\x00\x00\x00{\"roots\":[],\"manifest\":{}}      "))
	p := testPolicy(first)
	f.Fuzz(func(t *testing.T, in []byte) {
		got, err := through(bytes.NewReader(in), p)
		if err == nil && !bytes.Equal(got, in) {
			t.Fatal("other bytes came out than went in")
		}
		if err != nil && reason(err) == "" {
			t.Fatalf("an error without a reason: %v", err)
		}
		img, ierr := OpenAt(bytes.NewReader(in), p)
		if ierr == nil {
			ierr = img.Verify()
		}
		if err == nil && ierr != nil || ierr == nil && err != nil && reason(err) != TooLong {
			t.Fatalf("as a stream: %v; in place: %v", err, ierr)
		}
		_, _, _, _, _ = Read(bytes.NewReader(in))
	})
}

// FuzzRoots follows chains of key sets: no chain leads anywhere but where the trusted keys signed.
func FuzzRoots(f *testing.F) {
	b, first, second := testBundle(f, testManifest(), testParts(300, 20))
	roots, _, _, _, err := Read(bytes.NewReader(b))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(roots[0].Payload, roots[1].Payload, roots[1].Signatures[0].Sig, roots[1].Signatures[1].Sig, true)
	f.Add(roots[1].Payload, roots[0].Payload, roots[0].Signatures[0].Sig, roots[1].Signatures[1].Sig, false)
	f.Fuzz(func(t *testing.T, one, two, sigA, sigB []byte, both bool) {
		chain := []Envelope{roots[0], {PayloadType: typeRoot, Payload: two, Signatures: []Signature{
			{KeyID: roots[1].Signatures[0].KeyID, Sig: sigA}, {KeyID: roots[1].Signatures[1].KeyID, Sig: sigB}, roots[1].Signatures[2],
		}}}
		if !both {
			chain[0].Payload = one
		}
		if got, err := verifyChain(chain, first); err == nil && got.Version != second.Version {
			t.Fatalf("a chain leads to key set %d", got.Version)
		}
	})
}
