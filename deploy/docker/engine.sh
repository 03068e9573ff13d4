# shellcheck shell=bash
# Sourced by the scripts beside it: buildah and podman with storage and settings of their own.
images=${IMAGE_STORE:-/var/tmp/headroom-images}

require() {
    local missing=()
    for program in "$@"; do
        command -v "$program" > /dev/null || missing+=("$program")
    done
    [ ${#missing[@]} -eq 0 ] && return
    echo "missing: ${missing[*]}; on Debian, as root: make image-tools" >&2
    exit 1
}

configure() {
    mkdir -p "$images"
    cat > "$images/storage.conf" <<END
[storage]
driver = "overlay"
graphroot = "$images/store"
runroot = "$images/run"
END
    # Without systemd: no journal, no slices, no timers; crun fails where cgroups are hybrid.
    cat > "$images/containers.conf" <<END
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
END
    export CONTAINERS_STORAGE_CONF=$images/storage.conf CONTAINERS_CONF=$images/containers.conf
}
