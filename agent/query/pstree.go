package query

import (
	"context"
	"fmt"
	"io"

	"github.com/backdoor-rhs/backdoor/agent/kernel"
)

// Tree is the answer to "who started whom?". Its JSON is that of Processes, in the order of the tree, with their depth.
type Tree struct {
	Extent
	Processes []Branch `json:"processes"`
}

// Branch is a process in the tree.
type Branch struct {
	Process
	Depth int `json:"depth"`
	// Last tells for each depth from 1 on whether the process, or the ancestor there, is its parent's last child.
	Last []bool `json:"-"`
}

// AskTree makes a tree of the processes, or of those below the one that the argument names.
func AskTree(ctx context.Context, v *kernel.View, args []string) (Tree, error) {
	pid, err := process(args, 0)
	if err != nil {
		return Tree{}, err
	}
	ps, err := PS(ctx, v, PSOptions{})
	if err != nil {
		return Tree{}, err
	}
	return tree(ps, pid)
}

// tree sorts processes into a tree. One whose parent is not there, or is its own descendant, is a root.
func tree(ps Processes, below int) (Tree, error) {
	t := Tree{Extent: Extent{At: ps.At, Complete: ps.Complete, Doubts: ps.Doubts, Confidence: ps.Confidence}}
	children := make(map[int][]Process)
	there := make(map[int]bool)
	for _, p := range ps.Processes {
		there[p.PID] = true
	}
	var roots []Process
	for _, p := range ps.Processes {
		switch {
		case p.PID == below, below == 0 && (!there[p.PPID] || p.PPID == p.PID):
			roots = append(roots, p)
		default:
			children[p.PPID] = append(children[p.PPID], p)
		}
	}
	if below != 0 && !there[below] {
		return t, fmt.Errorf("process %d: %w", below, kernel.ErrNotFound)
	}
	seen := make(map[int]bool)
	type pending struct {
		p    Process
		last []bool
	}
	visit := func(root Process) {
		stack := []pending{{root, nil}}
		for len(stack) > 0 {
			x := stack[len(stack)-1]
			stack = stack[:len(stack)-1]
			if seen[x.p.PID] {
				continue
			}
			seen[x.p.PID] = true
			t.Processes = append(t.Processes, Branch{Process: x.p, Depth: len(x.last), Last: x.last})
			c := children[x.p.PID]
			for i := len(c) - 1; i >= 0; i-- {
				stack = append(stack, pending{c[i], append(x.last[:len(x.last):len(x.last)], i == len(c)-1)})
			}
		}
	}
	for _, r := range roots {
		visit(r)
	}
	if below == 0 {
		for _, p := range ps.Processes {
			if !seen[p.PID] {
				t.doubt(fmt.Errorf("process %d is its own ancestor", p.PID))
				visit(p)
			}
		}
	}
	return t, nil
}

// Text prints a tree like pstree(1)'s.
func (t Tree) Text(w io.Writer) error {
	p := &printer{w: w}
	for _, b := range t.Processes {
		for i, last := range b.Last {
			switch {
			case i < len(b.Last)-1 && last:
				p.printf("   ")
			case i < len(b.Last)-1:
				p.printf("│  ")
			case last:
				p.printf("└─ ")
			default:
				p.printf("├─ ")
			}
		}
		threads := ""
		if b.Threads > 1 {
			threads = fmt.Sprintf(" (%d threads)", b.Threads)
		}
		p.printf("%d %s%s\n", b.PID, command(b.Process), threads)
	}
	p.extent(t.Extent)
	return p.err
}
