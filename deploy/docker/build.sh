#!/usr/bin/env bash
# deploy/docker/build.sh [TARGET]: builds the image without an engine, by buildah.
# `docker build --target TARGET .` makes the same where there is Docker.
set -euo pipefail
cd "$(dirname "$0")/../.."
source deploy/docker/engine.sh
target=${1:-cpu}
require buildah python3
configure
base=docker.io/library/debian:bookworm-slim

# The published base where a registry answers, else one of the same packages. That one has this
# machine's list of package sources in it: it is good for a test, and not to be published.
if ! buildah inspect --type image "$base" > /dev/null 2>&1 && ! buildah pull -q "$base" 2> /dev/null; then
    require mmdebstrap
    echo "no registry answers: making $base from Debian's packages"
    sources=(/etc/apt/sources.list /etc/apt/sources.list.d/debian.sources)
    for file in "${sources[@]}"; do [ -s "$file" ] && break; done
    # As in the published one, without manuals and translations.
    # shellcheck disable=SC2016 # mmdebstrap's hook is expanded by its own shell
    mmdebstrap --quiet --variant=minbase --include=ca-certificates \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*' \
        bookworm "$images/base.tar" "$file"
    container=$(buildah from scratch)
    buildah add -q "$container" "$images/base.tar" / > /dev/null
    buildah config --cmd bash --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    buildah commit -q --rm "$container" "$base" > /dev/null
    rm "$images/base.tar"
fi

# What pip is told on this machine holds in the build too: certificates, mirrors, folders of
# wheels. Mounts leave nothing in the image.
python3 - "$images/pip.conf" > "$images/folders" <<'END'
import re, subprocess, sys
settings = {}
for line in subprocess.check_output(["python3", "-m", "pip", "config", "list"], text=True).splitlines():
    name, _, value = line.partition("=")
    settings[name.rpartition(".")[2]] = value.strip("'\"")
with open(sys.argv[1], "w") as file:
    file.write("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
# The index of a mirror refers to folders beside it.
folders = re.findall(r"(?:^|\s|file://)(/[^/\s]+/[^/\s]+)", " ".join(settings.values()))
print(*sorted(set(folders)), sep="\n")
END
mounts=(--volume "$images/pip.conf:/etc/pip.conf:ro")
while read -r folder; do
    [ ! -e "$folder" ] || mounts+=(--volume "$folder:$folder:ro")
done < <(printf '/etc/ssl/certs\n'; grep -v '^/etc/ssl' "$images/folders")

# The format of Docker keeps HEALTHCHECK, which that of OCI has no place for.
buildah bud --isolation chroot --pull-never --format docker --layers "${mounts[@]}" \
    --build-arg "REVISION=$(git rev-parse HEAD 2> /dev/null || echo unknown)" \
    --target "$target" --tag "headroom:$target" .
buildah images "headroom:$target"
