#!/usr/bin/env bash
# Builds k8s/Dockerfile for CPUs without a container engine and tests the image (`make image-test`).
#
# debootstrap makes the base image, a Debian 12, and buildah builds on it with chroot isolation, which
# needs no namespaces. The image then runs as its own user on a read-only root file system with no
# network but loopback (image-check.sh). Without a container engine, this does not test seccomp,
# dropped capabilities or a cluster's limits.
#
# Needs root, several minutes, up to 25 GB in IMAGE_TEST_DIR, kubectl, and the Debian packages buildah
# and debootstrap. The build uses this machine's pip configuration and the local folders it names.
set -euo pipefail
cd "$(dirname "$0")/.."

MIRROR=${MIRROR:-http://deb.debian.org/debian}
PIP_ARGS=${PIP_ARGS:-}

# -- inside new namespaces (see the last line): mounts, then the image's user -----------------------
if [[ ${1:-} == inside ]]; then
    root=$2 given=$3
    mount --make-rprivate /
    mount --bind "$root" "$root"
    mount -o remount,ro,bind "$root"
    mount -t proc proc "$root/proc"
    mount -t tmpfs tmpfs "$root/dev"
    for device in null zero full random urandom; do
        touch "$root/dev/$device"
        mount --bind "/dev/$device" "$root/dev/$device"
    done
    ln -s /proc/self/fd "$root/dev/fd"
    mkdir "$root/dev/shm"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
    mount --bind "$given" "$root/mnt"
    mount -o remount,ro,bind "$root/mnt"
    ip link set lo up
    # shellcheck disable=SC2046 # one variable per line, without spaces
    exec env -i $(cat "$given/image.env") chroot --userspec=10001:10001 --groups= "$root" \
        /bin/bash /mnt/image-check.sh
fi

for command in buildah debootstrap kubectl; do
    if ! command -v "$command" >/dev/null; then
        echo "image-test needs $command; for buildah and debootstrap: apt-get install" >&2
        exit 2
    fi
done
if [[ $(id -u) != 0 ]]; then
    echo "image-test needs root, for debootstrap and chroot" >&2
    exit 2
fi

work=${IMAGE_TEST_DIR:-/var/tmp/blip2-image-test}
mkdir -p "$work/given"
images() {
    buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"
}

echo "== base image: Debian 12 from debootstrap"
if [[ ! -e $work/base/etc/debian_version ]]; then
    debootstrap --variant=minbase bookworm "$work/base.part" "$MIRROR" >"$work/debootstrap.log"
    rm -rf "$work"/base.part/var/cache/apt/archives/*.deb "$work"/base.part/var/lib/apt/lists/*
    mv "$work/base.part" "$work/base"
fi
if ! images inspect --type image localhost/debian:12 >/dev/null 2>&1; then
    container=$(images from scratch)
    images add --quiet "$container" "$work/base" /
    images commit --quiet "$container" localhost/debian:12
    images rm "$container" >/dev/null
fi

echo "== build"
# Without layers, the remains of an earlier build are of no use.
images rm --all >/dev/null
images rmi --prune --force >/dev/null
build=(--isolation chroot --layers=false -f k8s/Dockerfile --build-arg "BASE=localhost/debian:12"
    --build-arg COMPILER= --build-arg "PIP_ARGS=$PIP_ARGS")
# Pass this machine's pip options on in one file, with local folders mounted at the same paths, and
# its certificates instead of the image's.
pip_option() { python3 -m pip config list | sed -nE "s/^(global|:env:)\.$1='(.*)'$/\2/p" | tail -1; }
echo '[global]' >"$work/pip.conf"
for option in index-url extra-index-url find-links constraint default-timeout; do
    value=$(pip_option "$option")
    if [[ -n $value ]]; then echo "$option = $value" >>"$work/pip.conf"; fi
done
while read -r path; do
    if [[ -e $path ]]; then build+=(--volume "$path:$path:ro"); fi
done < <(grep -oE '(file://)?/[^ ]+' "$work/pip.conf" | sed 's#^file://##; s#/simple/*$##' | sort -u)
certificates=$(pip_option cert)
if [[ -n $certificates ]]; then
    echo "cert = /run/pip-certificates.pem" >>"$work/pip.conf"
    build+=(--volume "$certificates:/run/pip-certificates.pem:ro")
fi
build+=(--secret "id=pip.conf,src=$work/pip.conf")
if ! images build "${build[@]}" -t localhost/blip2-serve . >"$work/build.log" 2>&1; then
    tail -n 30 "$work/build.log" >&2
    echo "the build failed; the whole log is in $work/build.log" >&2
    exit 1
fi
grep -E '^(\[[0-9]/[0-9]\] )?STEP' "$work/build.log"

echo "== run"
container=$(images from localhost/blip2-serve)
trap 'images rm --all >/dev/null; images rmi --force localhost/blip2-serve >/dev/null' EXIT
root=$(images mount "$container")
images inspect --type image --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' \
    localhost/blip2-serve >"$work/given/image.env"
kubectl kustomize k8s/overlays/dev-cpu >"$work/given/objects.yaml"
cp k8s/image-check.sh "$work/given/"
du -sh --apparent-size "$root" | sed 's#\t.*# in the image#'
unshare --mount --net --pid --fork --kill-child "$0" inside "$root" "$work/given"
