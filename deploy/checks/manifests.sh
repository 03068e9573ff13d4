#!/usr/bin/env bash
# The slow checks of `make manifests`: style, policies, images, scripts, rules.
set -euo pipefail
cd "$(dirname "$0")/../.."
checks=deploy/checks
rendered=$(mktemp -d)
trap 'rm -rf "$rendered"' EXIT

echo "yamllint"
yamllint --strict --config-file "$checks/yamllint.yaml" deploy
echo "hadolint"
hadolint --config "$checks/hadolint.yaml" Dockerfile
echo "shellcheck"
shellcheck --external-sources deploy/docker/*.sh "$checks"/*.sh tests/install-tools.sh
echo "promtool"
promtool=$(command -v promtool || echo .tools/usr/bin/promtool)
for overlay in deploy/kubernetes/overlays/*/; do
    name=$(basename "$overlay")
    .venv/bin/kubectl kustomize "$overlay" > "$rendered/$name.yaml"
    # As the cluster gets them.
    .venv/bin/python "$checks/unpack.py" "$rendered/$name.yaml" "$rendered/$name"
done
for rules in "$rendered"/*/rules/*.yml; do "$promtool" check rules --lint-fatal "$rules" > /dev/null; done
echo "checkov"
checkov --config-file "$checks/checkov.yaml" --directory "$rendered"
checkov --config-file "$checks/checkov.yaml" --file Dockerfile
