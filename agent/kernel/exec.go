package kernel

import "fmt"

// Exec is what the kernel has given a program as it was started, and what rights the process has now. A child that was not started as another program
// has its parent's.
type Exec struct {
	UID, EUID uint32 // AT_UID, AT_EUID
	Secure    bool   // AT_SECURE: it was given more rights than who has started it
	Rights    uint64 // cred.cap_permitted
}

// Entries of the auxiliary vector, include/uapi/linux/auxvec.h.
const (
	auxNull, auxUID, auxEUID, auxSecure = 0, 11, 12, 23
)

// Exec reads it (mm_struct.saved_auxv, which no process can change without CAP_SYS_RESOURCE). ErrNotFound says that the program is being started,
// ErrNotSupported that it was in another user namespace than the host's, whose numbers of users are others.
func (v *View) Exec(t Task) (Exec, error) {
	p := &v.img.signsPlan().exec
	if p.err != nil {
		return Exec{}, p.err
	}
	x, err := v.thing(p.task, t.Addr)
	if err != nil {
		return Exec{}, err
	}
	m, err := v.thing(p.mm, x.ptr("mm"))
	if err != nil {
		return Exec{}, err
	}
	if ns := m.ptr("user_ns"); ns != p.host {
		return Exec{}, fmt.Errorf("PID %d was started in another user namespace: %w", t.PID, ErrNotSupported)
	}
	c, err := v.thing(p.cred, x.ptr("real_cred"))
	if err != nil {
		return Exec{}, err
	}
	e := Exec{Rights: le64(c.bytes("cap_permitted"))}
	known := 0
	for b := m.bytes("saved_auxv"); len(b) >= 16 && le64(b) != auxNull; b = b[16:] {
		switch value := le64(b[8:]); le64(b) {
		case auxUID:
			e.UID = uint32(value)
			known++
		case auxEUID:
			e.EUID = uint32(value)
			known++
		case auxSecure:
			e.Secure = value != 0
			known++
		}
	}
	if known != 3 {
		return Exec{}, fmt.Errorf("PID %d is being started: %w", t.PID, ErrNotFound)
	}
	return e, nil
}
