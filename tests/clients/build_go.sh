#!/bin/sh
# Generate Go code from protos/ and compile the Go programs, all with Debian's packages and without a
# module proxy (GOPATH mode). The results are build/clients/go/day and build/clients/go/example.
set -eu
cd "$(dirname "$0")/../.."

out="$PWD/build/clients/go"
example="$out/src/example.com/outbox-example"
rm -rf "$out/src"
mkdir -p "$out/src" "$example"
# shellcheck disable=SC2046 # one word per file
protoc -I protos --go_out="$out/src" --go-grpc_out="$out/src" \
  $(cd protos && find outbox -name '*.proto')
# The example has the generated code in its own module, as `buf generate` writes it.
cp examples/go/main.go "$example"
mkdir -p "$example/gen/outbox"
cp -R "$out/src/outbox/v1" "$example/gen/outbox"

export GO111MODULE=off GOFLAGS='' GOPATH="$out:/usr/share/gocode"
export GOCACHE="${GOCACHE:-$PWD/build/clients/go-cache}"
go vet tests/clients/go/day.go
go build -o "$out/day" tests/clients/go/day.go
go build -o "$out/example" example.com/outbox-example
