// Package tests has the tests of the whole: the layers between packages, the first healing end to end, and faults. README.md
// says what they stand on.
package tests
