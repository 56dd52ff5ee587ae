#!/usr/bin/env bash
# Conformance runs DMTF's validators against a service.
#
# usage: redfish/conformance.sh VALIDATORS [TARGET]
#
# TARGET is "fake" (the default: the resources of a fake host with a recorded kernel, served by this machine), "lab" (the agent in the DPU
# of a lab, which is started with "backdoor lab up" and stopped again) or the URL of a service; for an URL, the variables REDFISH_USER and
# REDFISH_PASSWORD say who asks, and the host that the service watches is power-cycled.
#
# VALIDATORS is a folder with checkouts of DMTF's repositories under their own names: Redfish-Service-Validator (with DSP8010's CSDL
# files in SchemaFiles), Redfish-Protocol-Validator, Redfish-Interop-Validator, Redfish-Usecase-Checkers. What is not there is left out. Profiles
# for the Interop Validator are VALIDATORS/profiles/*.json. Python modules that the system lacks may lie in VALIDATORS/pylib; PYTHON is the
# interpreter (python3). ONLY="service protocol interop usecases" says which to run. Reports go to build/conformance/TARGET. The exit status
# is 1 if anything has failed.
#
# As root, the fake host is served in a network namespace of its own with an Ethernet interface: some validators send multicasts, and
# the service is to have an interface to show.
set -euo pipefail
usage="usage: redfish/conformance.sh VALIDATORS [fake|lab|URL]"
validators=$(cd "${1:?$usage}" && pwd)
target=${2:-fake}
if [ "$target" = fake ] && [ "$(id -u)" = 0 ] && [ -z "${CONFORMANCE_NAMESPACE:-}" ]; then
	exec env CONFORMANCE_NAMESPACE=1 unshare --net -- "$0" "$validators" fake
fi
cd "$(dirname "$0")/.."
top=$PWD
out=$top/build/conformance/${target%%:*}
mkdir -p "$out"
only=" ${ONLY:-service protocol interop usecases} "
python=${PYTHON:-python3}

# These override what the validators are told about certificates.
unset REQUESTS_CA_BUNDLE CURL_CA_BUNDLE SSL_CERT_FILE SSL_CERT_DIR
export PYTHONPATH=$validators/pylib${PYTHONPATH:+:$PYTHONPATH}
failed=0

case $target in
fake)
	go test -c -o "$out/host.test" ./redfish/host
	if [ -n "${CONFORMANCE_NAMESPACE:-}" ]; then
		ip link set lo up multicast on
		ip link add eth0 type veth peer name far
		ip link set far up
		ip address add 192.0.2.1/24 dev eth0
		ip link set eth0 up
		ip route add 224.0.0.0/4 dev lo
	fi
	url=https://127.0.0.1:18443 user=root password='correct horse'
	;;
lab)
	go build -trimpath -o build/bin/ ./cmd/backdoor
	lab=conformance-$$
	trap '"$top/build/bin/backdoor" lab down -name "$lab" >/dev/null' EXIT
	build/bin/backdoor lab up -slots -name "$lab" -json >"$out/lab.json"
	field() { "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["dpu"][sys.argv[2]])' "$out/lab.json" "$1"; }
	url=$(field url) user=$(field user) password=$(cat "$(field passwordFile)")
	;;
https://*)
	url=$target user=${REDFISH_USER:?} password=${REDFISH_PASSWORD:?}
	;;
*)
	echo "$usage"
	exit 2
	;;
esac
address=${url#https://}

# against NAME COMMAND… runs a validator; a fake host gets a service of its own for each.
against() {
	local name=$1 server= began=$SECONDS
	shift
	if [ "$target" = fake ]; then
		(cd "$top/redfish/host" && exec "$out/host.test" -test.run 'TestServe$' -serve "$address" -test.timeout 30m) >"$out/$name.server.log" 2>&1 &
		server=$!
	fi
	for _ in $(seq 100); do
		if curl -sk "$url/redfish" >/dev/null; then break; fi
		sleep 0.1
	done
	# It is off by default, and the Protocol Validator would have nothing to look at.
	curl -sk -u "$user:$password" -X PATCH -H 'Content-Type: application/json' -d '{"SSDP":{"ProtocolEnabled":true}}' \
		"$url/redfish/v1/Managers/bmc/NetworkProtocol" >/dev/null
	openssl s_client -connect "$address" </dev/null 2>/dev/null | openssl x509 >"$out/cert.pem"
	if ! "$@" >"$out/$name.log" 2>&1; then failed=1; fi
	if [ -n "$server" ]; then
		kill "$server"
		wait "$server" 2>/dev/null || true
	fi
	echo "== $name ($((SECONDS - began)) s)"
	tail -12 "$out/$name.log"
}

wanted() { [[ $only == *" $1 "* ]] && cd "$validators/$2" 2>/dev/null; }

if wanted service Redfish-Service-Validator; then
	against service "$python" RedfishServiceValidator.py -u "$user" -p "$password" -r "$url" --schema_directory SchemaFiles --logdir "$out/service"
	# What of that was the walk over the tree, and what of the walk the service's; the rest goes into the validator's reports.
	"$python" - "$out"/service/*/RedfishServiceValidatorDebug_*.log <<'EOF'
import datetime, os, re, sys
first = last = None
n = waited = 0
for line in open(max(sys.argv[1:], key=os.path.getmtime), errors="replace"):
    at = re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", line)
    if not at or " - HTML Report" in line:
        continue
    at = datetime.datetime.strptime(at.group(), "%Y-%m-%d %H:%M:%S,%f")
    answer = re.search(r"Response Time for \w+ to \S+: ([\d.]+)", line)
    if answer and " DELETE " not in line:
        n, waited = n + 1, waited + float(answer.group(1))
        first = first or at
    if "PASS" in line or "FAIL" in line or "WARN" in line or answer and " DELETE " not in line:
        last = at
if first:
    print(f"walk: {(last - first).total_seconds():.1f} s, of which {waited:.1f} s waiting for the answers to {n} requests")
EOF
fi
if wanted protocol Redfish-Protocol-Validator; then
	against protocol "$python" rf_protocol_validator.py -u "$user" -p "$password" -r "$url" --ca-bundle "$out/cert.pem" --avoid-http-redirect --report-dir "$out/protocol"
fi
if wanted interop Redfish-Interop-Validator; then
	for profile in "$validators"/profiles/*.json; do
		name=interop-$(basename "$profile" .json)
		against "$name" "$python" RedfishInteropValidator.py -u "$user" -p "$password" -r "$url" --authtype Basic \
			--no_online_profiles --required_profiles_dir "$validators/profiles" --logdir "$out/interop" "$profile"
		# It ends with 0 whatever it finds.
		if ! grep -Eq '^\| Fail +\| +0 \|' "$out/$name.log"; then failed=1; fi
	done
fi
if wanted usecases Redfish-Usecase-Checkers; then
	against usecases "$python" rf_use_case_checkers.py -u "$user" -p "$password" -r "$url" --report-dir "$out/usecases"
fi
exit $failed
