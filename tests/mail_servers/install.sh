#!/usr/bin/env bash
# Unpack Postfix, Exim and OpenSMTPD from Debian into build/mail-servers, one root folder each.
#
# The three packages conflict, and each has fixed paths, so none is installed: apt downloads the
# packages with the libraries that they need, and dpkg unpacks them. The tests run each server
# inside a copy of its folder (chroot). The machine's packages, services and lists stay as they are.
# Remove build/mail-servers to get newer versions.
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly TARGET=build/mail-servers
readonly SERVERS=(postfix exim opensmtpd)
declare -A PACKAGES=(
  [postfix]="postfix sasl2-bin libsasl2-modules"
  [exim]="exim4-daemon-light"
  [opensmtpd]="opensmtpd dash"
)
# The oldest versions that can run the tests.
declare -A OLDEST=(
  [postfix]=3.7.10 # smtpd_forbid_bare_newline
  [exim]=4.96
  [opensmtpd]=7.0 # 6.8, in Debian 12, cannot do TLS: it does not work with OpenSSL 3
)
declare -A BINARY=(
  [postfix]=usr/lib/postfix/sbin/smtpd [exim]=usr/sbin/exim4 [opensmtpd]=usr/sbin/smtpd
)
readonly BACKPORTS=bookworm-backports
readonly LIBRARY='^(lib|zlib1g)'

fail() {
  echo "make mail-servers: $*" >&2
  exit 1
}

stamp="$(sha256sum "$0" | cut -d ' ' -f 1)"
if [[ -f $TARGET/versions && "$(head -n 1 "$TARGET/versions")" == "$stamp" ]]; then
  tail -n +2 "$TARGET/versions"
  exit 0
fi
for tool in apt-get dpkg-deb; do
  command -v "$tool" >/dev/null || fail "needs $tool: the mail servers are Debian packages"
done
new="$(mktemp -d)"
trap 'rm -rf "$new"' EXIT

# The package sources of the machine, with separate lists. No package counts as installed, so apt
# lists every package that a server needs.
mkdir -p "$new"/apt/{lists,cache}/partial
: >"$new/apt/installed"
cat /etc/apt/sources.list >"$new/apt/sources.list" 2>/dev/null || true
if grep -q '^VERSION_CODENAME=bookworm$' /etc/os-release; then
  echo "deb http://deb.debian.org/debian $BACKPORTS main" >>"$new/apt/sources.list"
  PACKAGES[opensmtpd]="opensmtpd/$BACKPORTS dash"
fi
apt=(apt-get -qq --no-install-recommends
  -o "Dir::State::status=$new/apt/installed"
  -o "Dir::State::Lists=$new/apt/lists"
  -o "Dir::Cache=$new/apt/cache"
  -o "Dir::Etc::SourceList=$new/apt/sources.list"
  -o "APT::Sandbox::User=root"
  -o "Acquire::Languages=none"
  -o "Acquire::Retries=3")
cp /var/lib/apt/lists/*_{InRelease,Packages*} "$new/apt/lists/" 2>/dev/null || true
"${apt[@]}" update 2>"$new/apt/log" || fail "apt-get update: $(tail -n 3 "$new/apt/log")"

needed_by() { # PACKAGE...: print NAME=VERSION of each, and of the libraries that they need
  local names
  names="$(printf '%s\n' "${@%%/*}" | paste -s -d '|')"
  "${apt[@]}" --simulate install "$@" 2>"$new/apt/log" |
    awk -v wanted="$LIBRARY|^($names)\$" \
      '/^Inst / && $2 ~ wanted && $2 !~ /perl/ { sub(/^\(/, "", $3); print $2 "=" $3 }'
}

unpack() { # SERVER: download and unpack into $new/SERVER
  local root="$new/$1" archives="$new/archives/$1" archive
  local -a packages needed
  read -ra packages <<<"${PACKAGES[$1]}"
  mapfile -t needed < <(needed_by "${packages[@]}")
  ((${#needed[@]})) || fail "apt knows no ${packages[*]}: $(tail -n 3 "$new/apt/log")"
  mkdir -p "$root" "$archives"
  (cd "$archives" && "${apt[@]}" download "${needed[@]}" 2>"$new/apt/log") ||
    fail "cannot download the packages of $1: $(tail -n 3 "$new/apt/log")"
  for archive in "$archives"/*.deb; do
    dpkg-deb --extract "$archive" "$root"
  done
  # Half of the size, and not needed by a server.
  rm -rf "$root"/usr/share/{doc,man,locale,lintian,i18n} "$root"/usr/lib/*/gconv
}

check() { # SERVER: fail if it is too old or lacks a library; print its version
  local root="$new/$1" version folder missing
  version="$(dpkg-deb --field "$new/archives/$1/${PACKAGES[$1]%%[ /]*}"_*.deb Version)"
  dpkg --compare-versions "$version" ge "${OLDEST[$1]}" ||
    fail "$1 is $version, and the tests need ${OLDEST[$1]} or later"
  folder="$(basename "$root"/usr/lib/*-linux-gnu*)"
  missing="$("$root"/lib64/ld-linux-*.so.* --list --inhibit-cache \
    --library-path "$root/lib/$folder:$root/usr/lib/$folder:$root/usr/lib/postfix" \
    "$root/${BINARY[$1]}" | grep 'not found' || true)"
  [[ -z $missing ]] || fail "$1 lacks libraries: $missing"
  echo "$1 $version"
}

for server in "${SERVERS[@]}"; do
  unpack "$server"
done
{
  echo "$stamp"
  for server in "${SERVERS[@]}"; do
    check "$server"
  done
} >"$new/versions"
rm -rf "$new/archives" "$new/apt" "$TARGET" "$TARGET.part"
mkdir -p "$(dirname "$TARGET")"
cp -a "$new" "$TARGET.part"
chmod 755 "$TARGET.part"
mv "$TARGET.part" "$TARGET"
tail -n +2 "$TARGET/versions"
