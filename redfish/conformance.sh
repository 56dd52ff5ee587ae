#!/usr/bin/env bash
# Conformance runs DMTF's validators against the resources of a fake host.
#
# usage: redfish/conformance.sh VALIDATORS
#
# VALIDATORS is a folder with checkouts of DMTF's repositories under their own names: Redfish-Service-Validator (with DSP8010's CSDL
# files in SchemaFiles), Redfish-Protocol-Validator, Redfish-Interop-Validator, Redfish-Usecase-Checkers. What is not there is left out. Profiles
# for the Interop Validator are VALIDATORS/profiles/*.json. Python modules that the system lacks may lie in VALIDATORS/pylib.
# Reports go to build/conformance. The exit status is 1 if anything has failed.
set -euo pipefail
validators=$(cd "${1:?usage: redfish/conformance.sh VALIDATORS}" && pwd)
cd "$(dirname "$0")/.."
host=$PWD/redfish/host
out=$PWD/build/conformance
mkdir -p "$out"
go test -c -o "$out/host.test" ./redfish/host

# These override what the validators are told about certificates.
unset REQUESTS_CA_BUNDLE CURL_CA_BUNDLE SSL_CERT_FILE SSL_CERT_DIR
export PYTHONPATH=$validators/pylib${PYTHONPATH:+:$PYTHONPATH}
port=18443
url=https://127.0.0.1:$port user=root password='correct horse'
failed=0

# against NAME COMMAND… runs a validator against a service of its own.
against() {
	local name=$1
	shift
	(cd "$host" && exec "$out/host.test" -test.run 'TestServe$' -serve 127.0.0.1:$port -test.timeout 30m) >"$out/$name.server.log" 2>&1 &
	local server=$!
	for _ in $(seq 100); do
		if curl -sk "$url/redfish" >/dev/null; then break; fi
		sleep 0.1
	done
	openssl s_client -connect 127.0.0.1:$port </dev/null 2>/dev/null | openssl x509 >"$out/cert.pem"
	if ! "$@" >"$out/$name.log" 2>&1; then failed=1; fi
	kill "$server"
	wait "$server" 2>/dev/null || true
	echo "== $name"
	tail -12 "$out/$name.log"
}

if cd "$validators/Redfish-Service-Validator" 2>/dev/null; then
	against service python3 RedfishServiceValidator.py -u $user -p "$password" -r $url --schema_directory SchemaFiles --logdir "$out/service"
fi
if cd "$validators/Redfish-Protocol-Validator" 2>/dev/null; then
	against protocol python3 rf_protocol_validator.py -u $user -p "$password" -r $url --ca-bundle "$out/cert.pem" --avoid-http-redirect --report-dir "$out/protocol"
fi
if cd "$validators/Redfish-Interop-Validator" 2>/dev/null; then
	for profile in "$validators"/profiles/*.json; do
		name=interop-$(basename "$profile" .json)
		against "$name" python3 RedfishInteropValidator.py -u $user -p "$password" -r $url --authtype Basic \
			--no_online_profiles --required_profiles_dir "$validators/profiles" --logdir "$out/interop" "$profile"
		# It ends with 0 whatever it finds.
		if ! grep -Eq '^\| Fail +\| +0 \|' "$out/$name.log"; then failed=1; fi
	done
fi
if cd "$validators/Redfish-Usecase-Checkers" 2>/dev/null; then
	against usecases python3 rf_use_case_checkers.py -u $user -p "$password" -r $url --report-dir "$out/usecases"
fi
exit $failed
