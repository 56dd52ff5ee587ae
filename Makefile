# make help says what there is.

# Bash, so that make runs every line through it with the PATH below.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# The Go that "make setup" fetched, if it had to. The directory need not exist.
export PATH := $(CURDIR)/build/go/bin:$(PATH)

FUZZTIME ?= 20s
MUTATIONS ?= 1000
PASSES ?= 10000
BENCH ?= .

# A test that fails is run once more, alone, and both runs are told at the end: one that passes then does not turn the whole red, since
# the tests wait for emulated machines on a computer that has other work. Never run again: data races, panics, and more than a few.
GOTEST := go tool gotestsum --format standard-quiet --rerun-fails=1 --rerun-fails-max-failures=8 --rerun-fails-run-root-test --rerun-fails-abort-on-data-race

.PHONY: bench bench-rdma build clean conformance demo faults fuzz help images kernels kills lab lint peers powercuts rdma setup slots test torture

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r t d; do printf '%-12s %s\n' "$$t" "$$d"; done

setup: ## install what is needed: Debian packages, Go, modules, kernels (fast when nothing is missing)
	@images/setup.sh

build: setup ## build the commands into build/bin
	@mkdir -p build/bin
	go build -trimpath -o build/bin/ ./cmd/...

images: setup ## build the bootable images into build/images
	@go run ./images build all

demo: setup images ## a host falls ill and is healed from outside, with a timeline
	@go run ./tests/demo

lab: setup images ## start the lab (host, DPU, network) and leave it running
	@go run ./cmd/backdoor lab up

rdma: setup images ## all RDMA clients in all their ways against the lab's DPU, from monitors with kernels 6.1 and 6.12
	go test -count=1 -timeout 60m -run '^TestRDMA$$' -v ./tests -rdma-whole -rdma-kernels 6.1-generic,6.12-generic

test: setup images ## all tests: unit with the race detector, short fuzzing, images and lab in QEMU
	$(GOTEST) --packages=./... -- -race -short
	$(MAKE) fuzz FUZZTIME=3s MUTATIONS=50
	$(GOTEST) --packages="./agent/kernel ./agent/engine ./redfish/service ./redfish/firmware ./boot/bundle ./boot/slot ./images/... ./tests/..." -- -count=1 -p 1 -timeout 60m

kernels: setup ## hold the kernel model against every kernel of the table in QEMU (fetches some 900 MB, takes half an hour)
	go test -count=1 -timeout 120m ./agent/kernel -run 'TestGuest$$|TestListings$$' -guests all

.PHONY: ipmi
ipmi: setup images ## have a DPU switch its host through a BMC that has IPMI only, from the image with ipmitool
	go test -count=1 -timeout 30m -run '^TestIPMI$$' -v ./tests -ipmi

powercuts: setup images ## cut a DPU's power at 50 random moments of an update (about half an hour)
	go test -count=1 -timeout 2h -run '^TestUpdateDPU$$' -v ./tests -power-cuts=50

slots: setup images ## have a DPU start from slots whose images are broken in every way, hangs among them (some minutes)
	go test -count=1 -timeout 60m -run '^TestSlots$$' -v ./tests -thorough

.PHONY: principles
principles: setup images ## the seven principles, each by experiment and with a violation planted against it; the table is put into build/principles.md
	go test -count=1 -timeout 40m ./tests/principles -run TestPrinciples -whole -out $(CURDIR)/build/principles.md -v

# The fault suite's kernels, rows (names, main, all), numbers of CPUs, paths to memory (window, nocas, dma).
KERNELS ?= 6.1,6.12
ROWS ?= all
CPUS ?= 2
MEMPATH ?= window

faults: setup ## let KERNELS (6.1,6.12) fall ill in the ways ROWS (all; main), with CPUS (2), over MEMPATH (window; nocas, dma); the table is put into build/faults
	go test -count=1 -timeout 120m ./tests/faults -run TestFaults -kernels $(KERNELS) -rows $(ROWS) -cpus $(CPUS) -path $(MEMPATH) -out $(CURDIR)/build/faults/$(KERNELS)-$(CPUS)-$(MEMPATH) -v

.PHONY: faults-whole faults-table healthy
faults-whole: ## all rows, over the DMA engine's model and without compare-and-swap, too, then the main ones on sid and arm64, with 1 and 4 CPUs (an hour and a half)
	@rc=0; for what in KERNELS=6.1 KERNELS=6.12 "KERNELS=6.1 MEMPATH=dma" "KERNELS=6.1-generic ROWS=machine-check" \
		"KERNELS=sid ROWS=main" "KERNELS=6.1-cloud-arm64 ROWS=main" "KERNELS=13-6.12-arm64 ROWS=main" \
		"KERNELS=6.12 ROWS=main CPUS=1" "KERNELS=6.12 ROWS=main CPUS=4" "KERNELS=6.12 MEMPATH=nocas"; do \
		$(MAKE) faults $$what || rc=1; done; exit $$rc

faults-table: ## put what "make faults" has left in build/faults into the README's table
	go test -count=1 -short ./tests/faults -run TestReadme -readme

HEALTHY ?= 60m
healthy: setup ## have a healthy host of each of KERNELS work hard for HEALTHY (60m): nothing may be found
	go test -count=1 -timeout 4h ./tests/faults -run TestHealthy -kernels $(KERNELS) -healthy $(HEALTHY) -v

kills: setup ## kill 1010 processes of every kind in a guest, and say how long each took
	go test -count=1 -timeout 30m ./agent/engine -run TestLiveKill -guests 6.1 -kills 63 -v

lint: setup ## formatting, go vet, staticcheck
	@out=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$out" ]; then echo "not formatted by gofmt:"; echo "$$out"; exit 1; fi
	go vet ./...
	go tool staticcheck ./...

fuzz: setup ## run every fuzz target for FUZZTIME (20s), and alter the memory of guests MUTATIONS (1000) times
	@go run ./tests/fuzz -time $(FUZZTIME)
	go test -count=1 -timeout 60m ./agent/kernel -run 'TestMutations$$' -mutations $(MUTATIONS)

bench: setup images ## run the benchmarks that match BENCH (all), then measure the healing in the lab
	go test -run '^$$' -bench '$(BENCH)' -benchmem ./...
	@go run ./tests/bench

bench-rdma: setup ## measure RDMA against iperf3, TCP, rxe and rdma-core, in turn (guests take root); ROUNDS (5)
	@go run ./tests/rxe/bench -n $${ROUNDS:-5}

peers: setup ## hold agent/kernel against drgn and crash: RAM=file of a q35 machine with Debian's 6.1, VMLINUX=file with its symbols
	@test -n "$(RAM)" -a -n "$(VMLINUX)" || { echo "say: make peers RAM=file VMLINUX=file; see go doc ./tests/peers"; exit 2; }
	@go run ./tests/peers -ram "$(RAM)" -vmlinux "$(VMLINUX)"

torture: setup ## list hosts PASSES (10000) times while they fork, open sockets, mount and load modules
	go test ./agent/kernel -run 'TestListings$$/./^torture$$' -guests 6.1,6.12 -count=1 -timeout 4h -v -passes $(PASSES)

conformance: setup ## run DMTF's Redfish validators, from the checkouts in VALIDATORS, against a fake host, or TARGET=lab
	@test -n "$(VALIDATORS)" || { echo "say where the checkouts are: make conformance VALIDATORS=dir"; exit 2; }
	@redfish/conformance.sh "$(VALIDATORS)" $(TARGET)

clean: ## remove what the other targets made here; downloads stay in the user's cache directory
	rm -rf build
