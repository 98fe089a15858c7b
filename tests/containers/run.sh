#!/usr/bin/env bash
# Build the image with buildah into build/containers, as the Dockerfile says, without a registry.
# Then run the tests in containers.
#
# The base image is made from Debian packages. The machine's pip downloads the wheels, so the build
# needs no network. Podman and buildah use a store of their own: the machine's images, containers
# and settings stay as they are. Remove build/containers to get newer packages in the base.
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly TARGET=build/containers
readonly BASE=localhost/outbox-base
readonly HOST=localhost/outbox-host
readonly IMAGE=localhost/outbox:test
readonly PYTHON_OF_BASE=3.11 # Debian 12

fail() {
  echo "make test-containers: $*" >&2
  exit 1
}
# Not every machine may mount file systems or make namespaces. This says nothing about Outbox.
cannot() {
  if [[ ${OUTBOX_TEST_CONTAINERS:-} == if-possible ]]; then
    echo "make test-containers: NOT RUN, because this machine cannot run the containers: $*" >&2
    exit 0
  fi
  fail "this machine cannot run the containers: $*" \
    "(OUTBOX_TEST_CONTAINERS=if-possible makes this a message instead of an error)"
}
last_line() { # FILE
  grep -v '^$' "$1" | tail -n 1
}

mkdir -p "$TARGET"
(($(id -u) == 0)) || cannot "containers with overlay mounts need root"
tests/install_packages.sh mmdebstrap buildah podman runc netavark catatonit iproute2 \
  >"$TARGET/log" 2>&1 || cannot "apt-get cannot install podman: $(last_line "$TARGET/log")"
unshare --net true 2>"$TARGET/log" || cannot "$(last_line "$TARGET/log")"

here="$(pwd)/$TARGET"
# Podman allows 50 characters, and a work tree may lie deeper.
run="/run/outbox-$(sha256sum <<<"$here" | cut -c 1-12)"
mkdir -p "$run"

# An overlay on an overlay, as in a container, is not possible: then whole layers are copied.
driver=overlay
probe="$(mktemp -d -p "$here")"
trap 'rm -rf "$probe"' EXIT
mkdir "$probe"/{lower,upper,work,root}
if mount -t overlay none -o "lowerdir=$probe/lower,upperdir=$probe/upper,workdir=$probe/work" \
  "$probe/root" 2>"$TARGET/log"; then
  umount "$probe/root"
else
  driver=vfs
  echo "no overlay file system in $here ($(last_line "$TARGET/log")): copying layers instead"
fi

cat >"$TARGET/storage.conf" <<EOF
[storage]
driver = "$driver"
graphroot = "$here/store"
runroot = "$run/storage"
[storage.options.overlay]
# No mount stays behind, so that build/ can be removed.
skip_mount_home = "true"
EOF
cat >"$TARGET/containers.conf" <<EOF
[containers]
# Without them, podman raises the limits of this machine, which it may not be allowed to.
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
# Debian 12's crun does not run with both versions of control groups mounted.
runtime = "runc"
# No systemd is needed.
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "$run/libpod"
[network]
network_backend = "netavark"
EOF
export CONTAINERS_CONF="$here/containers.conf" CONTAINERS_STORAGE_CONF="$here/storage.conf"

# Before minutes are spent on the image: does a container in a pod, with limits, run here?
mkdir "$probe/root/"{dev,etc,proc,run,sys}
cp "$(command -v catatonit)" "$probe/root/init"
podman pod rm --force --ignore outbox-probe >"$TARGET/log" 2>&1 || true
{
  podman pod create --network host --name outbox-probe &&
    podman run --rm --pod outbox-probe --memory 64m --read-only --cap-drop ALL \
      --security-opt no-new-privileges --user 65532 --rootfs "$probe/root" /init --version
} >"$TARGET/log" 2>&1 || cannot "$(last_line "$TARGET/log")"
podman pod rm --force --time 0 outbox-probe >/dev/null

# Make a container from an image, run a command in it, and commit it: FROM TO COMMAND...
derive() {
  local container
  container="$(buildah from "$1")"
  buildah run --isolation chroot --network host "$container" -- "${@:3}" >"$TARGET/log" 2>&1 ||
    fail "cannot make the image $2: $(last_line "$TARGET/log") (all of it: $TARGET/log)"
  buildah commit --rm --quiet "$container" "$2" >/dev/null
}

if ! buildah inspect --type image "$BASE" >/dev/null 2>&1; then
  echo "making the base image"
  mmdebstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
    bookworm "$TARGET/base.tar" >"$TARGET/log" 2>&1 ||
    fail "mmdebstrap cannot make the base: $(last_line "$TARGET/log")"
  container="$(buildah from scratch)"
  buildah add "$container" "$TARGET/base.tar" / >/dev/null
  buildah commit --rm --quiet "$container" "$BASE" >/dev/null
  rm "$TARGET/base.tar"
fi
if ! buildah inspect --type image "$HOST" >/dev/null 2>&1; then
  echo "making the image of a host with systemd"
  derive "$BASE" "$HOST" sh -c \
    'apt-get update -qq && apt-get install -y -qq --no-install-recommends systemd &&
     apt-get clean && rm -r /var/lib/apt/lists'
fi

wheels="$TARGET/wheels"
locks=(deploy/image/build.lock deploy/image/production.lock)
stamp="$(cat "${locks[@]}" | sha256sum)"
if [[ ! -f $wheels/stamp || $(<"$wheels/stamp") != "$stamp" ]]; then
  echo "downloading the wheels"
  rm -rf "$wheels" && mkdir "$wheels"
  for lock in "${locks[@]}"; do
    # Without the conditions: this machine's Python may be another 3.11 than that of the base.
    sed -E 's/^(\S+) ; .*\\$/\1 \\/' "$lock" >"$wheels/$(basename "$lock")"
  done
  .venv/bin/pip download --quiet --disable-pip-version-check --only-binary :all: --no-deps \
    --python-version "$PYTHON_OF_BASE" --require-hashes --dest "$wheels" \
    --requirement "$wheels/build.lock" --requirement "$wheels/production.lock" \
    >"$TARGET/log" 2>&1 || fail "pip cannot download the wheels: $(last_line "$TARGET/log")"
  echo "$stamp" >"$wheels/stamp"
fi
printf '[global]\nno-index = true\nfind-links = /wheels\n' >"$TARGET/pip.conf"

echo "building the image"
buildah build --isolation chroot --network host --build-arg BASE="$BASE" \
  --volume "$here/wheels:/wheels:ro" --volume "$here/pip.conf:/etc/pip.conf:ro" \
  --tag "$IMAGE" --file deploy/image/Dockerfile . >"$TARGET/log" 2>&1 ||
  fail "buildah cannot build the image: $(last_line "$TARGET/log") (all of it: $TARGET/log)"
# The image that this one replaces.
buildah rmi --prune --force >/dev/null

# The network of the tests has nothing but their own loopback: their fixed ports are free.
unshare --net sh -c 'ip link set lo up && exec "$@"' sh \
  .venv/bin/pytest --numprocesses 0 tests/containers
