package service

import (
	"mime"
	"net/http"
	"time"
)

// downloadStall is how long a client may take no byte of a file.
const downloadStall = 30 * time.Second

// download answers GET and HEAD of a file, whole or in parts. What it holds may be secret: nobody on the way keeps it.
func (s *Service) download(w http.ResponseWriter, r *Request) error {
	f, err := r.node.route.Download(r)
	if err != nil {
		return r.missing(err)
	}
	defer f.Content.Close()
	media := f.Type
	if media == "" {
		media = "application/octet-stream"
	}
	if !acceptable(r.http.Header.Values("Accept"), media) && !acceptable(r.http.Header.Values("Accept"), "application/json") {
		return refuse(http.StatusNotAcceptable, "HeaderInvalid", "Accept")
	}
	h := w.Header()
	h.Set("Content-Type", media)
	h.Set("Cache-Control", "no-store")
	if f.Name != "" {
		h.Set("Content-Disposition", mime.FormatMediaType("attachment", map[string]string{"filename": f.Name}))
	}
	http.ServeContent(&patient{ResponseWriter: w, conn: http.NewResponseController(w)}, r.http, "", f.Made, f.Content)
	return nil
}

// patient is a writer that gives the client time as long as it takes something.
type patient struct {
	http.ResponseWriter
	conn *http.ResponseController
	turn turn
}

func (p *patient) Write(b []byte) (int, error) {
	// A connection without deadlines, as in tests, needs none.
	_ = p.conn.SetWriteDeadline(time.Now().Add(downloadStall))
	n, err := p.ResponseWriter.Write(b)
	p.turn.took(n)
	return n, err
}

// May reports whether the caller has a privilege. Routes say by themselves what they ask for; this is for what a GET shows.
func (c Caller) May(privilege string) bool { return c.may(privilege) }

// Caller returns a user as the caller of what comes by other ways than HTTP, such as RDMA, if the account is enabled and need not
// change its password first. Whoever asks has authenticated the user.
func (s *Service) Caller(user string) (Caller, bool) {
	a, ok := s.accounts.byUser(user)
	if !ok || !a.Enabled || a.Change {
		return Caller{}, false
	}
	return Caller{User: a.User, Role: a.Role, privileges: s.privileges(a.Role)}, true
}
