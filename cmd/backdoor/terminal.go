package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// isTerminal tells whether somebody may sit behind f.
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// askSecret asks a question on the terminal and reads the answer without showing it.
func (e *env) askSecret(question string) (string, error) {
	f := file(e.stdin)
	if f == nil || !isTerminal(f) {
		return "", errors.New("a password is needed and nobody can be asked here: use -password-file FILE, or - for standard input")
	}
	fmt.Fprint(e.stderr, question)
	defer fmt.Fprintln(e.stderr)
	old, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return "", fmt.Errorf("ask for a password: %w", err)
	}
	quiet := *old
	quiet.Lflag &^= unix.ECHO
	quiet.Lflag |= unix.ICANON | unix.ISIG
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, &quiet); err != nil {
		return "", fmt.Errorf("ask for a password: %w", err)
	}
	defer unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, old)
	line, err := readLine(f)
	if err != nil {
		return "", fmt.Errorf("ask for a password: %w", err)
	}
	return line, nil
}

// readSecret reads the first line of a file; "-" is the first unread line of standard input.
func (e *env) readSecret(path string) (string, error) {
	r := e.stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return "", fmt.Errorf("read password: %w", err)
		}
		defer f.Close()
		r = f
	}
	line, err := readLine(r)
	if err != nil {
		return "", fmt.Errorf("read password: %w", err)
	}
	if line == "" {
		return "", fmt.Errorf("read password: the first line of %s is empty", path)
	}
	return line, nil
}

// readLine reads one line byte by byte, so that the next reader finds the next line.
func readLine(r io.Reader) (string, error) {
	var line []byte
	var b [1]byte
	for len(line) < 4096 {
		n, err := r.Read(b[:])
		if n == 1 {
			if b[0] == '\n' {
				break
			}
			line = append(line, b[0])
			continue
		}
		if err != nil {
			if errors.Is(err, io.EOF) && len(line) > 0 {
				break
			}
			return "", err
		}
	}
	return strings.TrimRight(string(line), "\r"), nil
}
