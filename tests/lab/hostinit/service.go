package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/backdoor-rhs/backdoor/tests/lab/control"
)

// store is the state of the TCP service: lost when the host dies, so that a client can tell a host that was healed
// from one that was restarted.
type store struct {
	boot string

	mu     sync.Mutex
	values map[string]string // guarded by mu
	served uint64            // guarded by mu
}

// serve is the service echod. A session is lines of text; each is answered by one line:
//
//	HELLO          the boot_id of the kernel and the number of requests served so far
//	SET KEY VALUE  OK
//	GET KEY        the value, or a single -
//	INCR KEY       the value plus one, stored
//	anything else  its number in this session and the line itself
func serve() error {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", fmt.Sprintf(":%d", control.ServicePort))
	if err != nil {
		return err
	}
	s := &store{boot: strings.TrimSpace(string(id)), values: make(map[string]string)}
	for {
		conn, err := ln.Accept()
		if err != nil {
			return err
		}
		go s.session(conn)
	}
}

func (s *store) session(conn net.Conn) {
	defer conn.Close()
	in := bufio.NewScanner(conn)
	in.Buffer(nil, 64<<10)
	for n := 1; in.Scan(); n++ {
		if _, err := fmt.Fprintln(conn, s.answer(n, in.Text())); err != nil {
			return
		}
	}
}

func (s *store) answer(n int, line string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.served++
	f := strings.Fields(line)
	switch {
	case len(f) == 1 && f[0] == "HELLO":
		return fmt.Sprintf("%s %d", s.boot, s.served)
	case len(f) == 3 && f[0] == "SET":
		s.values[f[1]] = f[2]
		return "OK"
	case len(f) == 2 && f[0] == "GET":
		if v, ok := s.values[f[1]]; ok {
			return v
		}
		return "-"
	case len(f) == 2 && f[0] == "INCR":
		v, _ := strconv.Atoi(s.values[f[1]]) // what is no number counts from zero
		s.values[f[1]] = strconv.Itoa(v + 1)
		return s.values[f[1]]
	}
	return fmt.Sprintf("%d %s", n, line)
}
