#!/usr/bin/env bash
# Build the image with buildah into build/containers, as the Dockerfile says, without a registry.
# Then run the tests in containers: all of them, or with --short those for CI (marker `short`).
#
# The base image is made from Debian packages. The machine's pip downloads the wheels, so the build
# needs no network. Podman and buildah use a store of their own: the machine's images, containers
# and settings stay as they are. Remove build/containers to get newer packages in the base.
#
# OUTBOX_TEST_CONTAINERS=if-possible: where containers cannot run, say so and succeed.
# OUTBOX_TEST_CONTAINERS_SECONDS=N: end after N seconds, as if they could not run.
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly TARGET=build/containers
readonly BASE=localhost/outbox-base
readonly HOST=localhost/outbox-host
readonly IMAGE=localhost/outbox:test
readonly PYTHON_OF_BASE=3.11 # Debian 12
readonly LEAST_GIB=4

short=false
[[ ${1:-} != --short ]] || short=true

say() {
  echo "tests in containers, after $SECONDS s: $*" >&2
}
fail() {
  say "FAILED: $*"
  exit 1
}
# Not every machine may mount file systems or make namespaces. This says nothing about Outbox.
cannot() {
  trap - ERR
  if [[ ${OUTBOX_TEST_CONTAINERS:-} == if-possible ]]; then
    say "NOT RUN: $*"
    exit 0
  fi
  fail "$* (OUTBOX_TEST_CONTAINERS=if-possible makes this a message instead of an error)"
}
last_line() { # FILE
  grep -v '^$' "$1" | tail -n 1
}

here="$(pwd)/$TARGET"
export CONTAINERS_CONF="$here/containers.conf" CONTAINERS_STORAGE_CONF="$here/storage.conf"

# The whole script runs once more, below a time limit. Its signal lets pytest remove the containers.
seconds="${OUTBOX_TEST_CONTAINERS_SECONDS:-}"
if [[ -n $seconds ]]; then
  ((seconds >= 120)) || cannot "$seconds s are left for them, and they take at least 120 s"
  code=0
  env --unset OUTBOX_TEST_CONTAINERS_SECONDS \
    timeout --signal INT --kill-after 60 "$seconds" tests/containers/run.sh "$@" || code=$?
  if ((code == 124 || code == 137)); then
    podman pod rm --all --force --time 0 >/dev/null 2>&1 || true
    cannot "they did not end within $seconds s"
  fi
  exit "$code"
fi

# Until the image is built, what fails is the machine, its network or its packages.
trap 'cannot "line $LINENO: $BASH_COMMAND failed"' ERR
mkdir -p "$TARGET"
(($(id -u) == 0)) || cannot "containers with overlay mounts need root"
tests/install_packages.sh mmdebstrap buildah podman runc netavark aardvark-dns iptables catatonit iproute2 \
  >"$TARGET/log" 2>&1 || cannot "apt-get cannot install podman: $(last_line "$TARGET/log")"
unshare --net true 2>"$TARGET/log" || cannot "$(last_line "$TARGET/log")"
free="$(df --output=avail --block-size=1G "$TARGET" | tail -n 1)"
((free >= LEAST_GIB)) || cannot "$TARGET needs $LEAST_GIB GiB of disk space, and$free are free"

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
  why="no overlay file system in $here: $(head -n 1 "$TARGET/log")"
  $short && cannot "$why"
  say "copying layers, which is slow: $why"
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
network_config_dir = "$run/networks"
EOF

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
    cannot "the image $2 cannot be made: $(last_line "$TARGET/log") (all of it: $TARGET/log)"
  buildah commit --rm --quiet "$container" "$2" >/dev/null
}

if ! buildah inspect --type image "$BASE" >/dev/null 2>&1; then
  say "making the base image"
  # A file system that nobody keeps need not be on disk after each file.
  mmdebstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
    --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    bookworm "$TARGET/base.tar" >"$TARGET/log" 2>&1 ||
    cannot "mmdebstrap cannot make the base: $(last_line "$TARGET/log")"
  container="$(buildah from scratch)"
  buildah add "$container" "$TARGET/base.tar" / >/dev/null
  buildah commit --rm --quiet "$container" "$BASE" >/dev/null
  rm "$TARGET/base.tar"
fi
if ! $short && ! buildah inspect --type image "$HOST" >/dev/null 2>&1; then
  say "making the image of a host with systemd"
  derive "$BASE" "$HOST" sh -c \
    'apt-get update -qq && apt-get install -y -qq --no-install-recommends systemd &&
     apt-get clean && rm -r /var/lib/apt/lists'
fi

if ! $short && [[ ! -x $TARGET/compose/bin/podman-compose ]]; then
  say "installing podman-compose"
  python3 -m venv "$TARGET/compose"
  "$TARGET/compose/bin/pip" install --quiet --disable-pip-version-check --require-hashes \
    --requirement tests/containers/compose.lock >"$TARGET/log" 2>&1 ||
    cannot "pip cannot install podman-compose: $(last_line "$TARGET/log")"
fi
# The images of compose.yaml that are not ours, with Debian's servers in them.
if ! $short; then
  say "making the images that stand in for those of others"
  while read -r name image; do
    buildah build --isolation chroot --network host --layers --build-arg BASE="$BASE" \
      --target "$name" --tag "$image" --file tests/containers/stand_ins/Containerfile \
      tests/containers/stand_ins >"$TARGET/log" 2>&1 ||
      cannot "buildah cannot make $image: $(last_line "$TARGET/log") (all of it: $TARGET/log)"
  done < <(.venv/bin/python -m tests.containers.compose_images)
fi

wheels="$TARGET/wheels"
locks=(deploy/image/build.lock deploy/image/production.lock)
stamp="$(cat "${locks[@]}" | sha256sum)"
if [[ ! -f $wheels/stamp || $(<"$wheels/stamp") != "$stamp" ]]; then
  say "downloading the wheels"
  rm -rf "$wheels" && mkdir "$wheels"
  for lock in "${locks[@]}"; do
    # Without the conditions: this machine's Python may be another 3.11 than that of the base.
    sed -E 's/^(\S+) ; .*\\$/\1 \\/' "$lock" >"$wheels/$(basename "$lock")"
  done
  .venv/bin/pip download --quiet --disable-pip-version-check --only-binary :all: --no-deps \
    --python-version "$PYTHON_OF_BASE" --require-hashes --dest "$wheels" \
    --requirement "$wheels/build.lock" --requirement "$wheels/production.lock" \
    >"$TARGET/log" 2>&1 || cannot "pip cannot download the wheels: $(last_line "$TARGET/log")"
  echo "$stamp" >"$wheels/stamp"
fi
printf '[global]\nno-index = true\nfind-links = /wheels\n' >"$TARGET/pip.conf"
podman run --rm --network host "$BASE" python3 -c 'import ensurepip, venv' >"$TARGET/log" 2>&1 ||
  cannot "the base image does not run: $(last_line "$TARGET/log")"
trap - ERR

say "building the image"
buildah build --isolation chroot --network host --build-arg BASE="$BASE" \
  --volume "$here/wheels:/wheels:ro" --volume "$here/pip.conf:/etc/pip.conf:ro" \
  --tag "$IMAGE" --file deploy/image/Dockerfile . >"$TARGET/log" 2>&1 ||
  fail "buildah cannot build the image: $(last_line "$TARGET/log") (all of it: $TARGET/log)"
# The image that this one replaces.
buildah rmi --prune --force >/dev/null || true

say "running the tests"
words=(--numprocesses 0 tests/containers)
# The first failure ends the short form: what follows it could use up the time.
$short && words+=(-m short --exitfirst)
# The network of the tests has nothing but their own loopback: their fixed ports are free.
unshare --net sh -c 'ip link set lo up && exec "$@"' sh .venv/bin/pytest "${words[@]}"
say "passed"
