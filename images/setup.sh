#!/bin/sh
# Makes a bare Debian machine ready to build, test and demonstrate: Debian packages, a Go toolchain, Go modules, kernels.
#
# It says what it does, installs only what is missing, and is done in a fraction of a second when nothing is. Debian
# packages need root, or sudo; everything else goes to the user's cache directory. Settings of the machine and the user
# (apt's sources and proxies, GOPROXY, GOFLAGS, GOTOOLCHAIN) are respected.
#
# A Go that is missing or too old is not replaced: Debian's own fetches the one that is needed as a module, like any
# other module, and build/go leads to it. The Makefile puts build/go/bin first in PATH.
set -eu

# The Go that is fetched, and the module checksums (as in go.sum) of its packages.
go_version=1.26.8
go_sum_amd64='h1:ZOmGe1OnfREDMIdb1Qi4G9JSuDPBLGExZMQ4nis1RXM='
go_sum_arm64='h1:sYL/O6MqS68ML0kjsQ36WoYIpJqkw60TxizWUYUKQMc='

# Several clones, or CI and a person, may set up at once.
cache="${XDG_CACHE_HOME:-${HOME:?is not set}/.cache}/backdoor"
say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }

cd "$(dirname "$0")/.."
PATH="$PWD/build/go/bin:$PATH:/usr/sbin:/sbin"
export PATH

[ -e /etc/debian_version ] || die "this is not Debian; install what images/debian-packages.txt lists and Go $go_version yourself"

packages() { sed -e 's/#.*//' -e 's/[[:space:]].*//' -e '/^$/d' images/debian-packages.txt; }

missing() {
	for p in "$@"; do
		case "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" in
		installed) ;;
		*) echo "$p" ;;
		esac
	done
}

install() {
	say "installing Debian packages:" "$@"
	if [ "$(id -u)" = 0 ]; then
		as_root=
	elif command -v sudo >/dev/null; then
		as_root=sudo
		say "sudo may ask for your password"
	else
		die "these Debian packages are missing, and you are neither root nor is there sudo: have someone run: apt-get install $*"
	fi
	# A repository that does not answer need not be one of those that have the packages.
	$as_root env DEBIAN_FRONTEND=noninteractive apt-get -q update || say "apt-get update had errors; going on"
	$as_root env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "$@" ||
		die "apt-get could not install: $*"
}

# need_go says whether the go in PATH cannot build this module, by itself or by fetching a toolchain (Go 1.21 and later).
need_go() {
	command -v go >/dev/null || return 0
	have=$(go env GOVERSION 2>/dev/null) || return 0 # too old, and told not to fetch another
	want=$(sed -n 's/^go //p' go.mod)
	[ "$(printf '%s\n' "$want" "${have#go}" | sort -V | head -n 1)" != "$want" ]
}

fetch_go() {
	case "$(dpkg --print-architecture)" in
	amd64) arch=amd64 sum=$go_sum_amd64 ;;
	arm64) arch=arm64 sum=$go_sum_arm64 ;;
	*) die "Go $go_version or later is needed; there is none to fetch for $(dpkg --print-architecture)" ;;
	esac
	root="$cache/go$go_version-$arch"
	if [ ! -x "$root/bin/go" ]; then
		if ! command -v go >/dev/null; then
			install golang-go
			hash -r
			need_go || return 0 # it fetches what it needs by itself
		fi
		say "fetching Go $go_version with $(go version | cut -d' ' -f3)"
		mkdir -p "$cache"
		tmp=$(mktemp -d "$cache/.go-XXXXXX")
		trap 'rm -rf "$tmp"' EXIT
		# The checksum is known here, so the checksum database need not be asked. Outside the module, so that its
		# go.mod does not matter to an old Go.
		mkdir "$tmp/empty"
		(cd "$tmp/empty" && GOTOOLCHAIN=local GOFLAGS=-modcacherw GONOSUMDB=golang.org/toolchain GOMODCACHE="$tmp/mod" GO111MODULE=on \
			go mod download -json "golang.org/toolchain@v0.0.1-go$go_version.linux-$arch") >"$tmp/json" || {
			cat "$tmp/json" >&2
			die "fetching Go $go_version as a module did not work"
		}
		grep -qF "\"Sum\": \"$sum\"" "$tmp/json" || die "the checksum of Go $go_version is not $sum: $(cat "$tmp/json")"
		tree="$tmp/mod/golang.org/toolchain@v0.0.1-go$go_version.linux-$arch"
		# As cmd/go does: a module has no execute bits, and its inner go.mod files are called _go.mod.
		chmod -R u+w "$tree"
		find "$tree/bin" "$tree/pkg/tool" -type f -exec chmod 755 {} +
		find "$tree" -name _go.mod | while read -r f; do mv "$f" "${f%/_go.mod}/go.mod"; done
		mv -T "$tree" "$root" 2>/dev/null || [ -x "$root/bin/go" ] || die "could not put Go into $root"
		rm -rf "$tmp"
		trap - EXIT
	fi
	mkdir -p build
	ln -sfn "$root" build/go
	hash -r
	say "using $(go version | cut -d' ' -f3) from $root"
}

# What is done is known by a hash of all that decides it; a few look-ups see to it that it is still there.
stamp="$cache/setup-$(cat images/setup.sh images/debian-packages.txt images/kernels/kernels.go go.mod go.sum | sha256sum | cut -c1-20)"
todo=$(missing $(packages))
if [ -e "$stamp" ] && [ -z "$todo" ]; then
	if need_go; then fetch_go; fi
	exit 0
fi

if [ -n "$todo" ]; then
	# shellcheck disable=SC2086 # one word a package
	install $todo
fi
if need_go; then fetch_go; fi
say "Go modules"
go mod download
say "kernels"
go run ./images kernels
mkdir -p "$cache"
touch "$stamp"
say "done"
