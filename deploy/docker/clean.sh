#!/usr/bin/env bash
# Removes the images that build.sh made, their layers and settings.
set -euo pipefail
cd "$(dirname "$0")/../.."
source deploy/docker/engine.sh
[ -d "$images" ] || exit 0
require podman
configure
podman system reset --force > /dev/null
rm -rf "$images"
