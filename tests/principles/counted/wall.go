//go:build amd64

package main

import (
	"bufio"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// The wall clock's rounds, each of which a line on the console starts.
const (
	elements = 1 << 20 // of each of the triad's arrays, 8 bytes each: beyond all caches but the last
	triads   = 8
	sleeps   = 60
)

// wall measures what a neighbour could slow down, by the clock: STREAM's triad (McCalpin: a[i] = b[i] + s*c[i]; 24 bytes of traffic for each), and
// how long after a sleep of a millisecond the scheduler lets the sleeper run, median and 95th percentile.
func wall() {
	a, b, c := make([]float64, elements), make([]float64, elements), make([]float64, elements)
	for i := range a {
		b[i], c[i] = float64(i), float64(2*i)
	}
	in := bufio.NewScanner(os.Stdin)
	fmt.Println("counted: ready")
	for in.Scan() {
		began := time.Now()
		for k := range triads {
			s := float64(k)
			for i := range a {
				a[i] = b[i] + s*c[i]
			}
		}
		rate := float64(triads*24*elements) / time.Since(began).Seconds() / 1e6
		late := make([]time.Duration, sleeps)
		for i := range late {
			began := time.Now()
			ts := unix.NsecToTimespec(int64(time.Millisecond))
			if err := unix.Nanosleep(&ts, nil); err != nil {
				fmt.Println("counted:", err)
			}
			late[i] = time.Since(began) - time.Millisecond
		}
		slices.Sort(late)
		fmt.Printf("counted: round %.3f %d %d\n", rate, late[sleeps/2].Nanoseconds(), late[sleeps*95/100].Nanoseconds())
	}
}
