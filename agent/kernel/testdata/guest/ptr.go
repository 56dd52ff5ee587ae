package main

import "unsafe"

// ptr returns the address of s as a C string, for prctl.
func ptr(s string) unsafe.Pointer { return unsafe.Pointer(&append([]byte(s), 0)[0]) }
