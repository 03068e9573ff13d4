#!/usr/bin/env bash
# deploy/docker/test.sh: runs the image as it is run in production (not root, nothing writable but
# /tmp, no capabilities), asks for health and a text over both runtimes, with tokens and TLS, looks
# for every bundled model, and reports its size.
set -euo pipefail
cd "$(dirname "$0")/../.."
source deploy/docker/engine.sh
require podman runc jq openssl
configure
image=localhost/headroom:cpu
name=headroom-image-test
max_megabytes=1500
# podman asks for more open files than a user without CAP_SYS_RESOURCE may have.
confined=(
    --pull never --read-only --tmpfs /tmp:size=1g --cap-drop ALL --security-opt no-new-privileges
    --ulimit nofile=1024:20000 --ulimit nproc=4096:4096
)

fail() {
    echo "FAILED: $1" >&2
    podman logs "$name" 2>&1 | tail -20 >&2
    exit 1
}
secrets=$(mktemp -d)
trap 'podman rm --force --time 0 "$name" > /dev/null 2>&1 || true; rm -r "$secrets"' EXIT

# As docs/deploy.md says for compose; the image makes the token.
openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=headroom -addext subjectAltName=IP:127.0.0.1 \
    -keyout "$secrets/tls.key" -out "$secrets/tls.crt" 2> /dev/null
podman run --rm "${confined[@]}" --network none "$image" token test > "$secrets/tokens.yaml" 2> "$secrets/all"
grep -E '^[A-Za-z0-9_-]{40,}$' "$secrets/all" > "$secrets/token"
chmod -R a+rX "$secrets"
client="--tls-ca /secrets/tls.crt --token-file /secrets/token"

port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

try() {
    local runtime=$1 port http_port metrics_port
    port=$(port) http_port=$(port) metrics_port=$(port)
    podman rm --force --time 0 "$name" > /dev/null 2>&1 || true
    podman run --detach --name "$name" "${confined[@]}" --network host --memory 4g --shm-size 256m \
        --volume "$secrets:/secrets:ro" --health-cmd "headroom health --target 127.0.0.1:$port $client" \
        "$image" serve --runtime "$runtime" --port "$port" --http-port "$http_port" --metrics-port "$metrics_port" \
        --tokens /secrets/tokens.yaml --tls-cert /secrets/tls.crt --tls-key /secrets/tls.key > /dev/null
    for _ in $(seq 120); do
        podman logs "$name" 2>&1 | grep -q '^ready' && break
        [ "$(podman inspect "$name" --format '{{.State.Running}}')" = true ] || fail "$runtime ended"
        sleep 1
    done
    # Without systemd nobody asks by itself.
    podman healthcheck run "$name" > /dev/null || fail "$runtime: not healthy"
    # shellcheck disable=SC2086 # several words
    text=$(podman exec "$name" headroom generate --target "127.0.0.1:$port" $client --max-tokens 16 --json 'def main(') \
        || fail "$runtime: no text"
    [ "$(jq '.token_ids | length' <<< "$text")" -gt 0 ] || fail "$runtime: an empty text"

    local status
    status=$(podman exec "$name" cat /proc/1/status)
    grep -qE '^Uid:\s+10001\s+10001' <<< "$status" || fail "$runtime: another user"
    grep -qE '^CapEff:\s+0+$' <<< "$status" || fail "$runtime: capabilities"
    grep -qE '^NoNewPrivs:\s+1$' <<< "$status" || fail "$runtime: may gain privileges"
    grep -qE '^Seccomp:\s+2$' <<< "$status" || fail "$runtime: no seccomp"
    podman exec "$name" sh -c '! touch /opt/headroom/x 2> /dev/null' || fail "$runtime: a writable root"
    local memory
    memory=$(podman stats --no-stream --format '{{.MemUsage}}' "$name")
    podman stop --time 60 "$name" > /dev/null
    [ "$(podman inspect "$name" --format '{{.State.ExitCode}}')" = 0 ] || fail "$runtime: no clean end"
    echo "$runtime: healthy, generated $(jq -c .text <<< "$text"), $memory, ended cleanly"
}

[ "$(podman image inspect "$image" --format '{{.Config.User}}')" = 10001:10001 ] || fail "user"
podman image inspect "$image" | jq --exit-status '.[0].Healthcheck.Test == ["CMD", "headroom", "health"]' > /dev/null \
    || fail "HEALTHCHECK"
try standalone
try ray
for model in demo demo-gqa demo-mqa demo-pruned; do
    podman run --rm "${confined[@]}" --network none "$image" plan --model "$model" --kv-memory 192MiB --json \
        | jq --exit-status '.plan.concurrent | tonumber > 0' > /dev/null || fail "no $model"
done
podman run --rm "${confined[@]}" --network none --entrypoint cat "$image" \
    /opt/headroom/share/headroom/sbom.cdx.json \
    | jq --exit-status '[.components[].name] | contains(["torch", "ray", "headroom"])' > /dev/null || fail "no inventory"
podman run --rm "${confined[@]}" --network none --entrypoint grep "$image" -q '^| torch ' \
    /opt/headroom/share/headroom/licences.md || fail "no licences"
megabytes=$(($(podman image inspect "$image" --format '{{.Size}}') / 1000000))
echo "size: $megabytes MB of at most $max_megabytes"
[ "$megabytes" -le "$max_megabytes" ]
