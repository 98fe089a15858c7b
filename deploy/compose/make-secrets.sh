#!/bin/sh
# Makes the files in secrets/ that compose.yaml reads; files that exist are kept.
# Containers read them as user 65532, so they are readable by all, in a folder that only you may enter.
set -eu
cd "$(dirname "$0")"
mkdir -p secrets
chmod 700 secrets
cd secrets

random() { # bytes: prints that many random bytes in base64url
  head -c "$1" /dev/urandom | base64 | tr -d '\n' | tr '+/' '-_'
}
keep() { # file: writes stdin to the file, unless it exists
  [ -e "$1" ] || { cat >"$1.new" && chmod 644 "$1.new" && mv "$1.new" "$1"; }
}

random 24 | keep postgres-password
random 24 | keep grafana-password
random 32 | keep encryption-keys
printf 'postgresql://outbox:%s@postgres:5432/outbox' "$(cat postgres-password)" | keep database-url
# The first operator's key: obx_, ten letters or digits, _, 32 random bytes.
id=$(LC_ALL=C tr -dc 'abcdefghijkmnpqrstuvwxyz23456789' </dev/urandom | head -c 10)
printf 'obx_%s_%s' "$id" "$(random 32 | tr -d =)" | keep api-key
