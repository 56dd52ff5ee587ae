package main

import "os"

func load(kernel, initrd *os.File, commandLine string) error { return nil }
func jump() error                                            { return nil }
