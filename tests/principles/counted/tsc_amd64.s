#include "textflag.h"

// func tsc() uint64
TEXT ·tsc(SB), NOSPLIT, $0-8
	// The mark: NOPL 0xba0dd00d(AX)(AX*1).
	BYTE $0x0f; BYTE $0x1f; BYTE $0x84; BYTE $0x00
	LONG $0xba0dd00d
	LFENCE
	RDTSC
	SHLQ $32, DX
	ORQ  DX, AX
	MOVQ AX, ret+0(FP)
	RET
