#!/usr/bin/env bash
# Programs that tests run beside Python packages: Prometheus with promtool, Chromium, and openssl.
# What is installed already is used. On Debian the rest is fetched: Prometheus is only unpacked
# into .tools, because its package would start a service; Chromium is installed, which needs root.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .tools

missing=()
for program in prometheus promtool chromium openssl; do
    command -v "$program" > /dev/null || [ -x ".tools/usr/bin/$program" ] || missing+=("$program")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if ! command -v apt-get > /dev/null; then
    echo "missing: ${missing[*]}; install them and run this again" >&2
    exit 1
fi

[ "$(id -u)" -ne 0 ] || apt-get update -qq
if [[ " ${missing[*]} " == *" prom"* ]]; then
    # The folder of a root user may be closed to apt's own, and a download there only warns.
    (cd .tools && apt-get download -qq prometheus 2> /dev/null && dpkg -x prometheus_*.deb . && rm prometheus_*.deb)
fi
if [[ " ${missing[*]} " == *" chromium "* ]]; then
    if [ "$(id -u)" -ne 0 ]; then
        echo "missing: chromium; as root: apt-get install chromium" >&2
        exit 1
    fi
    apt-get install --yes -qq --no-install-recommends chromium fonts-dejavu-core > /dev/null
fi
if [[ " ${missing[*]} " == *" openssl "* ]]; then
    if [ "$(id -u)" -ne 0 ]; then
        echo "missing: openssl; as root: apt-get install openssl" >&2
        exit 1
    fi
    apt-get install --yes -qq --no-install-recommends openssl > /dev/null
fi
