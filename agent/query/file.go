package query

import (
	"context"
	"fmt"
	"io"
	"iter"
	"strconv"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// OpenFiles is the answer to "what do the processes have open?".
type OpenFiles struct {
	Extent
	Files []kernel.OpenFile `json:"files"`
}

// AskOpenFiles lists the open files of all processes, or of the one that the argument names.
func AskOpenFiles(ctx context.Context, v *kernel.View, args []string) (OpenFiles, error) {
	pid, err := process(args, 0)
	if err != nil {
		return OpenFiles{}, err
	}
	return openFiles(ctx, v.OpenFiles(pid))
}

func openFiles(ctx context.Context, seq iter.Seq2[kernel.OpenFile, error]) (f OpenFiles, err error) {
	f.Files, err = gather(ctx, &f.Extent, seq)
	return f, err
}

// process takes a PID from the arguments, otherwise if there is none.
func process(args []string, otherwise int) (int, error) {
	if len(args) == 0 {
		return otherwise, nil
	}
	pid, err := strconv.Atoi(args[0])
	if err != nil || pid <= 0 {
		return 0, &ArgumentError{args[0], "a process ID"}
	}
	return pid, nil
}

// Text prints a table like lsof(8)'s.
func (f OpenFiles) Text(w io.Writer) error {
	p := &printer{w: w}
	rows := [][]string{{"PID", "COMMAND", "FD", "TYPE", "DEVICE", "SIZE/OFF", "NODE", "NAME"}}
	for _, x := range f.Files {
		size := ""
		switch x.Kind {
		case "file", "dir", "link":
			size = strconv.FormatInt(x.Size, 10)
		case "char", "block":
			size = fmt.Sprintf("0t%d", x.Pos)
		}
		fd := x.FD
		if x.Addr != 0 && x.FD != "exe" {
			fd += [4]string{"r", "w", "u", "?"}[x.Flags&3]
		}
		rows = append(rows, []string{strconv.Itoa(x.PID), Clean(x.Comm), fd, x.Kind, x.Dev, size, strconv.FormatUint(x.Inode, 10), Clean(x.Path)})
	}
	p.table("><><>>><", rows)
	p.extent(f.Extent)
	return p.err
}
