"""The protos as other projects use them: over REST, and in every language."""

from __future__ import annotations

from pathlib import Path

from google.api.annotations_pb2 import http
from google.api.http_pb2 import HttpRule
from google.protobuf.descriptor_pb2 import FileDescriptorSet

ROOT = Path(__file__).parents[2]
CONTRACT = ROOT / "client" / "src" / "outbox" / "v1" / "outbox.binpb"
RELEASED = ROOT / ".ci" / "released-contract.binpb"
# The names of generated code in other languages than Python. None contains a domain or a
# repository, whose owner may change.
NAMES = {
    "csharp_namespace": "Outbox.V1",
    "go_package": "outbox/v1;outboxv1",
    "java_multiple_files": True,
    "java_package": "outbox.v1",
    "php_namespace": "Outbox\\V1",
    "ruby_package": "Outbox::V1",
}


def read(image: Path) -> FileDescriptorSet:
    return FileDescriptorSet.FromString(image.read_bytes())


def rest_calls(contract: FileDescriptorSet) -> set[tuple[str, str, str, str]]:
    """Return (method, verb, path, body) of each way to call a method over REST."""
    found = set()
    for file in contract.file:
        for service in file.service:
            for method in service.method:
                rule: HttpRule = method.options.Extensions[http]
                for way in (rule, *rule.additional_bindings):
                    verb = way.WhichOneof("pattern") or ""
                    path = getattr(way, verb)
                    found.add((f"{service.name}/{method.name}", verb, path, way.body))
    return found


def test_every_released_rest_call_still_exists() -> None:
    # buf does not compare options of google.api.
    released = rest_calls(read(RELEASED))
    assert len(released) > 30
    assert released <= rest_calls(read(CONTRACT))


def test_every_proto_file_has_all_language_options() -> None:
    files = [file for file in read(CONTRACT).file if file.name.startswith("outbox/")]
    assert len(files) == len([*(ROOT / "protos" / "outbox").rglob("*.proto")])
    for file in files:
        found = {name: getattr(file.options, name) for name in NAMES}
        assert found == NAMES, file.name
        # Without it the class of sender.proto would be SenderOuterClass, because the file has a
        # message Sender.
        stem = Path(file.name).stem.title().replace("_", "")
        assert file.options.java_outer_classname == f"{stem}Proto"
