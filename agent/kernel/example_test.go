package kernel_test

import (
	"context"
	"fmt"
	"log"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
	"github.com/backdoor-rhs/backdoor/nicfw/hostmem"
)

// Print the tasks of a memory image: an ELF vmcore, a LiME file or a raw dump. Nothing but the file is needed.
func Example() {
	mem, err := hostmem.OpenImage("vmcore")
	if err != nil {
		log.Fatal(err)
	}
	defer mem.Close()
	ctx := context.Background()
	img, err := kernel.Open(ctx, mem, kernel.Options{})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(img.Info().Banner)
	for task, err := range img.View(ctx).Tasks() {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%7d %7d %s %-16s %8d KiB\n", task.PID, task.PPID, task.State, task.Comm, task.RSS>>10)
	}
}
