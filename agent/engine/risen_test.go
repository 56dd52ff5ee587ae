package engine

import (
	"errors"
	"testing"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

func TestRisen(t *testing.T) {
	const all = 1<<41 - 1
	// A list has one process beside init, and what it was started with.
	type list struct {
		task kernel.Task
		exec kernel.Exec
	}
	none := kernel.Exec{UID: 1000, EUID: 1000}
	user := list{kernel.Task{PID: 7, TGID: 7, UID: 1000, Start: 5, Execs: 3}, none}
	root := func(execs uint32, x kernel.Exec) list {
		return list{kernel.Task{PID: 7, TGID: 7, Start: 5, Execs: execs, MaySetUID: true}, x}
	}
	given, shell := root(3, kernel.Exec{UID: 1000, EUID: 1000, Rights: all}), root(4, kernel.Exec{Rights: all})
	su := root(4, kernel.Exec{UID: 1000, Secure: true, Rights: all})
	by := func(x list, f func(*list)) list { f(&x); return x }
	for _, tt := range []struct {
		name  string
		lists []list
		want  int // after the last
	}{
		{"its credentials were changed", []list{user, given, given}, 1},
		{"nobody has seen it before", []list{given, given}, 1},
		{"seen once only", []list{user, given}, 0},
		{"it starts a shell then", []list{user, given, given, shell, shell}, 1},
		{"it has started a shell before it was seen", []list{user, shell, shell}, 1},
		{"it is stripped", []list{user, given, given, user}, 0},
		{"it starts su", []list{user, su, su, su}, 0},
		{"su has started a shell in its place", []list{user, su, root(5, kernel.Exec{Rights: all}), root(5, kernel.Exec{Rights: all})}, 0},
		{"doas has, and was not seen", []list{user, root(5, kernel.Exec{Rights: all}), root(5, kernel.Exec{Rights: all})}, 0},
		{"su is caught while it starts", []list{user, root(4, kernel.Exec{UID: 1000, EUID: 1000, Rights: all}), su, su}, 0},
		{"a service with a right to", []list{root(1, kernel.Exec{UID: 9, EUID: 9, Rights: 1 << 7}), root(1, kernel.Exec{UID: 9, EUID: 9, Rights: 1 << 7})}, 0},
		{"a service that goes back to root", []list{by(user, func(x *list) { x.task.MaySetUID, x.exec = true, kernel.Exec{} }), root(3, kernel.Exec{Rights: all}), root(3, kernel.Exec{Rights: all})}, 0},
		{"a program with a right of its file", []list{root(1, kernel.Exec{UID: 9, EUID: 9, Secure: true, Rights: all}), root(1, kernel.Exec{UID: 9, EUID: 9, Secure: true, Rights: all})}, 0},
		{"its number is used again", []list{user, by(shell, func(x *list) { x.task.Start = 6 }), by(shell, func(x *list) { x.task.Start = 6 })}, 0},
		{"a thread of the kernel", []list{by(given, func(x *list) { x.task.KThread = true }), by(given, func(x *list) { x.task.KThread = true })}, 0},
	} {
		var r risen
		var before []kernel.Task
		for _, l := range tt.lists {
			now := []kernel.Task{{PID: 1, TGID: 1}, l.task}
			r.see(before, now, func(x kernel.Task) (kernel.Exec, error) {
				if x.PID == 1 {
					return kernel.Exec{}, errors.New("is being started")
				}
				return l.exec, nil
			})
			before = now
		}
		if len(r.tasks) != tt.want {
			t.Errorf("%s: %+v", tt.name, r.tasks)
		}
	}
}
