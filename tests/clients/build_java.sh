#!/bin/sh
# Generate Java code from protos/ and compile the Java program, all with Debian's packages.
# build/clients/java/day runs it.
set -eu
cd "$(dirname "$0")/../.."

out="$PWD/build/clients/java"
rm -rf "$out"
mkdir -p "$out/gen" "$out/classes"
# Google's messages too: Debian has no Java package with them.
# shellcheck disable=SC2046 # one word per file
protoc -I protos --java_out="$out/gen" \
  --plugin=protoc-gen-grpc-java=/usr/bin/grpc_java_plugin --grpc-java_out="$out/gen" \
  $(cd protos && find google outbox -name '*.proto')

path="$out/classes"
for jar in protobuf grpc-api grpc-context grpc-core grpc-netty grpc-protobuf grpc-protobuf-lite \
  grpc-stub guava gson netty-buffer netty-codec netty-codec-http netty-codec-http2 netty-codec-socks \
  netty-common netty-handler netty-handler-proxy netty-resolver netty-transport \
  perfmark-api perfmark-impl geronimo-annotation-1.3-spec; do
  path="$path:/usr/share/java/$jar.jar"
done
find "$out/gen" tests/clients/java -name '*.java' >"$out/sources"
javac -nowarn -proc:none -encoding UTF-8 -d "$out/classes" -cp "$path" @"$out/sources"
printf '#!/bin/sh\nexec java -XX:TieredStopAtLevel=1 -cp "%s" Day "$@"\n' "$path" >"$out/day"
chmod +x "$out/day"
