// Package principles proves the seven principles of the Backdoor architecture by experiment, each on real machines, and prints what came
// of it as a table (make principles).
//
// A row is one experiment: what it does, what it measured, whether the principle held. Beside it stands a violation that is planted on
// purpose, under which the same experiment must fail: a row that nothing can turn red proves nothing. Where the laboratory has nothing
// that could be attacked, a row says so and was not tested.
package principles
