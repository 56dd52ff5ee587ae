package service

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/backdoor-rhs/backdoor/redfish/schema"
)

// fakeUpdater takes every image that does not begin with "bad".
type fakeUpdater struct {
	max int64

	mu        sync.Mutex // guards what follows
	sum       [sha256.Size]byte
	size      int64
	options   UpdateOptions
	activated []string
}

func (u *fakeUpdater) MaxImage() int64 { return u.max }

func (u *fakeUpdater) Inventory(context.Context) ([]*schema.SoftwareInventory, error) {
	return []*schema.SoftwareInventory{{Resource: schema.Resource{ID: "a", Name: "Slot A"}, Version: "1", Manufacturer: "Test", Updateable: true}}, nil
}

func (u *fakeUpdater) Activate(_ context.Context, ids []string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.activated = ids
	return nil
}

func (u *fakeUpdater) Install(ctx context.Context, image io.Reader, o UpdateOptions, report func(int, string, ...string)) error {
	head := make([]byte, 3)
	if _, err := io.ReadFull(image, head); err != nil {
		return fmt.Errorf("read image: %w", err)
	}
	if string(head) == "bad" {
		return Because(400, "OperationFailed", "The image is bad.")
	}
	hash := sha256.New()
	hash.Write(head)
	n, err := io.Copy(hash, image)
	if err != nil {
		return fmt.Errorf("read image: %w", err)
	}
	report(50, "InstallingOnComponent", "image", "a")
	u.mu.Lock()
	defer u.mu.Unlock()
	u.size, u.options = n+3, o
	hash.Sum(u.sum[:0])
	return nil
}

// updateBody is a multipart body with an image.
func updateBody(t testing.TB, parameters string, image io.Reader, late bool) (io.Reader, string) {
	t.Helper()
	in, out := io.Pipe()
	w := multipart.NewWriter(out)
	go func() {
		write := func(name, text string) {
			if text == "" {
				return
			}
			p, err := w.CreateFormField(name)
			if err == nil {
				_, err = io.WriteString(p, text)
			}
			if err != nil {
				out.CloseWithError(err)
			}
		}
		if !late {
			write("UpdateParameters", parameters)
		}
		if image != nil {
			p, err := w.CreateFormFile("UpdateFile", "image.bin")
			if err == nil {
				_, err = io.Copy(p, image)
			}
			if err != nil {
				out.CloseWithError(err)
				return
			}
		}
		if late {
			write("UpdateParameters", parameters)
		}
		out.CloseWithError(w.Close())
	}()
	return in, w.FormDataContentType()
}

// upload pushes a body, and returns the status and the monitor's answer once the task has ended.
func upload(t testing.TB, p *peer, body io.Reader, contentType string) (status int, task answer) {
	t.Helper()
	req, err := http.NewRequest("POST", p.url+pushURI, body)
	if err != nil {
		t.Fatal(err)
	}
	req.SetBasicAuth(testUser, testPassword)
	req.Header.Set("Content-Type", contentType)
	resp, err := p.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 202 {
		return resp.StatusCode, answer{}
	}
	for {
		if a := p.do("GET", resp.Header.Get("Location"), ""); a.StatusCode != 202 {
			return 202, a
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestUpdatePush(t *testing.T) {
	u := &fakeUpdater{max: 1 << 20}
	s, _ := newTestService(t, Options{Updater: u})
	p := newPeer(t, listen(t, s))
	if a := p.do("GET", updateURI, ""); a.at("MultipartHttpPushUri") != pushURI || a.at("MaxImageSizeBytes") != float64(1<<20) {
		t.Errorf("UpdateService = %s", a.body)
	}
	if a := p.do("GET", inventoryURI+"/a", ""); a.at("Version") != "1" {
		t.Errorf("inventory = %s", a.body)
	}
	image := bytes.Repeat([]byte("good"), 100_000)
	body, kind := updateBody(t, `{"Targets":["`+inventoryURI+`/a"],"ForceUpdate":true,"@Redfish.OperationApplyTime":"Immediate"}`, bytes.NewReader(image), false)
	if status, task := upload(t, p, body, kind); status != 202 || task.StatusCode != 200 || task.at("TaskState") != "Completed" {
		t.Fatalf("push = %d, %d %s", status, task.StatusCode, task.body)
	}
	if u.sum != sha256.Sum256(image) || !u.options.Force || len(u.options.Targets) != 1 {
		t.Errorf("installed %d bytes with %+v", u.size, u.options)
	}
	for name, tc := range map[string]struct {
		parameters string
		image      io.Reader
		late       bool
		status     int // of the push
		end        int // of the task's monitor
	}{
		"late parameters that ask for nothing": {`{}`, strings.NewReader("good"), true, 202, 200},
		"late parameters that ask":             {`{"ForceUpdate":true}`, strings.NewReader("good"), true, 400, 0},
		"bad parameters":                       {`{"Targets":`, strings.NewReader("good"), false, 400, 0},
		"deep parameters":                      {strings.Repeat("[", 100), strings.NewReader("good"), false, 400, 0},
		"no image":                             {`{}`, nil, false, 400, 0},
		"a short bad image":                    {"", strings.NewReader("bad"), false, 202, 400},
		"a long bad image":                     {"", io.MultiReader(strings.NewReader("bad"), bytes.NewReader(make([]byte, 900<<10))), false, 400, 0},
		"an image that is too large":           {"", bytes.NewReader(make([]byte, 3<<20)), false, 413, 0},
		"an empty image":                       {"", strings.NewReader(""), false, 202, 500},
	} {
		body, kind := updateBody(t, tc.parameters, tc.image, tc.late)
		status, task := upload(t, p, body, kind)
		if tc.end == 400 && status == 400 {
			status, task.Response = 202, &http.Response{StatusCode: 400} // refused before or after the body's end: either is right
		}
		if status != tc.status || tc.end != 0 && task.StatusCode != tc.end {
			t.Errorf("%s: %d, then %+v; want %d, then %d", name, status, task.Response, tc.status, tc.end)
		}
	}
	for kind, want := range map[string]int{"application/json": 415, "multipart/form-data": 415, "multipart/form-data; boundary=x": 400} {
		if status, _ := upload(t, p, strings.NewReader("--x\r\nbroken"), kind); status != want {
			t.Errorf("%s = %d; want %d", kind, status, want)
		}
	}
	if a := p.do("GET", pushURI, ""); a.StatusCode != 405 || a.Header.Get("Allow") != "POST" {
		t.Errorf("GET of the push URI = %d, Allow %s", a.StatusCode, a.Header.Get("Allow"))
	}
	if a := p.do("POST", updateURI+"/Actions/UpdateService.Activate", `{"Targets":["`+inventoryURI+`/a"]}`); a.StatusCode != 204 || len(u.activated) != 1 || u.activated[0] != "a" {
		t.Errorf("Activate = %d %s, %q", a.StatusCode, a.body, u.activated)
	}
	// After all this the way is free.
	body, kind = updateBody(t, "", strings.NewReader("good"), false)
	if status, task := upload(t, p, body, kind); status != 202 || task.StatusCode != 200 {
		t.Errorf("the last push = %d, %d", status, task.StatusCode)
	}
}

// endless is an image of any size that costs nothing.
type endless struct{ left int64 }

func (e *endless) Read(p []byte) (int, error) {
	if e.left == 0 {
		return 0, io.EOF
	}
	n := min(int64(len(p)), e.left)
	e.left -= n
	return int(n), nil
}

// TestUpdateIsStreamed pushes an image that is far larger than the memory it may take.
func TestUpdateIsStreamed(t *testing.T) {
	if testing.Short() {
		t.Skip("256 MiB over TLS are left out of short runs")
	}
	const size = 256 << 20
	s, _ := newTestService(t, Options{Updater: &fakeUpdater{max: size}})
	p := newPeer(t, listen(t, s))
	var before, now runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	most := uint64(0)
	done := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for {
			select {
			case <-done:
				return
			case <-time.After(50 * time.Millisecond):
				runtime.ReadMemStats(&now)
				most = max(most, now.HeapInuse)
			}
		}
	}()
	body, kind := updateBody(t, "", &endless{size}, false)
	status, task := upload(t, p, body, kind)
	close(done)
	<-watched
	if status != 202 || task.StatusCode != 200 {
		t.Fatalf("push = %d, %d %s", status, task.StatusCode, task.body)
	}
	if most > before.HeapInuse+32<<20 {
		t.Errorf("the heap grew from %d to %d MiB for an image of %d MiB", before.HeapInuse>>20, most>>20, size>>20)
	}
}

func TestSimpleUpdate(t *testing.T) {
	u := &fakeUpdater{max: 1 << 20}
	s, _ := newTestService(t, Options{Updater: u, Reach: anywhere})
	p := newPeer(t, listen(t, s))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch user, password, _ := r.BasicAuth(); {
		case r.URL.Path == "/large":
			w.Header().Set("Content-Length", fmt.Sprint(2<<20))
		case r.URL.Path == "/endless":
			_, _ = io.Copy(w, &endless{4 << 20})
		case r.URL.Path == "/redirect":
			http.Redirect(w, r, "/good", http.StatusFound)
		case user != "u" || password != "top secret":
			w.WriteHeader(401)
		default:
			_, _ = io.WriteString(w, "good image")
		}
	}))
	defer server.Close()
	const action = updateURI + "/Actions/UpdateService.SimpleUpdate"
	for path, want := range map[string]int{"/good": 200, "/large": 413, "/endless": 413, "/redirect": 502} {
		a := p.do("POST", action, fmt.Sprintf(`{"ImageURI":%q,"Username":"u","Password":"top secret"}`, server.URL+path))
		if a.StatusCode != 202 || strings.Contains(string(a.body), "top secret") {
			t.Fatalf("%s = %d %s", path, a.StatusCode, a.body)
		}
		monitor := a.Header.Get("Location")
		for a.StatusCode == 202 {
			time.Sleep(10 * time.Millisecond)
			a = p.do("GET", monitor, "")
		}
		if a.StatusCode != want {
			t.Errorf("%s ends with %d %s; want %d", path, a.StatusCode, a.body, want)
		}
	}
	strict, _ := newTestService(t, Options{Updater: u})
	p = newPeer(t, listen(t, strict))
	for _, uri := range []string{server.URL + "/good", "file:///etc/passwd", "https://169.254.169.254/x", "https://[::1]/", "scp://192.0.2.1/x"} {
		if a := p.do("POST", action, fmt.Sprintf(`{"ImageURI":%q}`, uri)); a.StatusCode != 400 {
			t.Errorf("%s = %d %s", uri, a.StatusCode, a.body)
		}
	}
	if a := newPeer(t, p.url).do("POST", action, `{"ImageURI":"x"}`, "Authorization", ""); a.StatusCode != 401 {
		t.Errorf("without credentials = %d", a.StatusCode)
	}
}

func FuzzMultipart(f *testing.F) {
	body, _ := updateBody(f, `{"Targets":["/x"]}`, strings.NewReader("good"), false)
	good, err := io.ReadAll(body)
	if err != nil {
		f.Fatal(err)
	}
	boundary, _, _ := bytes.Cut(good[2:], []byte("\r\n"))
	f.Add(string(boundary), good)
	f.Add("x", []byte("--x\r\nContent-Disposition: form-data; name=UpdateFile\r\n\r\nbad\r\n--x--"))
	s, _ := newTestService(f, Options{Updater: &fakeUpdater{max: 1 << 16}, Limits: Limits{Tasks: 1000}})
	token, _ := s.sessions.open(testUser, "")
	f.Fuzz(func(t *testing.T, boundary string, body []byte) {
		req := httptest.NewRequest("POST", "https://x"+pushURI, bytes.NewReader(body))
		req.Header.Set("Content-Type", "multipart/form-data; boundary=\""+strings.NewReplacer(`"`, "", `\`, "", "\r", "", "\n", "").Replace(boundary)+"\"")
		req.Header.Set("X-Auth-Token", token)
		w := httptest.NewRecorder()
		s.ServeHTTP(w, req)
		if w.Code >= 500 {
			t.Fatalf("push of %q = %d %s", body, w.Code, w.Body)
		}
		for _, task := range s.tasks.list() {
			<-task.done
		}
	})
}

var errTest = errors.New("test")

func TestParseParameters(t *testing.T) {
	var o UpdateOptions
	if err := parseParameters(io.MultiReader(strings.NewReader("{"), failingReader{}), 10, &o); err == nil {
		t.Error("parameters that cannot be read were taken")
	}
}

type failingReader struct{}

func (failingReader) Read([]byte) (int, error) { return 0, errTest }
