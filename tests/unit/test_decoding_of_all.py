"""Random bytes for every request of the contract: in parts, they are what they are at once."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from random import Random
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from outbox import v1

from outbox_server.shared.errors import OutboxError
from outbox_server.shared.rpc.decoding import AT_ONCE, Decoder

INPUTS = 5
VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5
UNKNOWN = (77, 19_000, 2**29 - 1)
SIZES = {
    **dict.fromkeys((FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FIXED64), FIXED64),
    FieldDescriptor.TYPE_FLOAT: FIXED32,
}


def requests() -> list[type[Message]]:
    modules = (
        import_module(f"outbox.v1.{each.name}")
        for each in iter_modules(v1.__path__)
        if each.name.endswith("_pb2")
    )
    found = {
        method.input_type.full_name: GetMessageClass(method.input_type)
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    return [found[name] for name in sorted(found)]


class RandomFields:
    """Writes random fields; `damaged` ones may break rules of the format."""

    def __init__(self, random: Random, *, damaged: bool) -> None:
        self._random = random
        self._damaged = damaged

    def message(self, kind: Any, depth: int = 0) -> bytes:
        """Return fields of a message: known and unknown, twice, packed and not, short and long."""
        counts = (0, 1, 2, 3) if depth else (2, 5, 30)
        return b"".join(
            self._unknown()
            if not kind.fields or self._rarely()
            else self._times(self._random.choice(kind.fields), depth)
            for _ in range(self._random.choice(counts))
        )

    def _rarely(self) -> bool:
        return self._random.random() < 0.06

    def _times(self, field: FieldDescriptor, depth: int) -> bytes:
        most = 40 if field.is_repeated else 2
        return b"".join(
            self._known(field, depth) for _ in range(self._random.choice((1, 1, 1, most)))
        )

    def _known(self, field: FieldDescriptor, depth: int) -> bytes:
        if self._damaged and self._rarely():
            return self._unknown(field.number)
        if field.message_type is not None:
            inner = self.message(field.message_type, depth + 1) if depth < 5 else b""
            return self.field(field.number, DELIMITED, inner)
        if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            return self.field(field.number, DELIMITED, self._text())
        kind = SIZES.get(field.type, VARINT)
        if field.is_repeated and self._random.random() < 0.5:
            entries = (self._number(kind) for _ in range(self._random.choice((0, 1, 10))))
            return self.field(field.number, DELIMITED, b"".join(entries))
        return self.field(field.number, kind, self._number(kind))

    def _unknown(self, number: int | None = None) -> bytes:
        kind = self._random.choice((VARINT, FIXED64, DELIMITED, FIXED32))
        body = self._text() if kind == DELIMITED else self._number(kind)
        return self.field(number or self._random.choice(UNKNOWN), kind, body)

    def _text(self) -> bytes:
        size = self._random.choice((0, 1, 5, 20, 200, 70_000))
        bad = self._damaged and self._rarely()
        return self._random.choice((b"x", "é".encode(), b"\0")) * size + b"\xff" * bad

    def _number(self, kind: int) -> bytes:
        if kind == VARINT:
            return self._varint(self._random.choice((0, 1, 5, 128, 2**31, 2**63, 2**64 - 1)))
        return self._random.randbytes(8 if kind == FIXED64 else 4)

    def _varint(self, number: int) -> bytes:
        digits = [number >> shift & 0x7F for shift in range(0, max(number.bit_length(), 1), 7)]
        if self._damaged and self._rarely():
            digits += [0] * self._random.randint(1, 3)
        return bytes(digit | 0x80 for digit in digits[:-1]) + bytes(digits[-1:])

    def field(self, number: int, kind: int, body: bytes) -> bytes:
        size = self._varint(len(body)) if kind == DELIMITED else b""
        return self._varint(number << 3 | kind) + size + body


def at_once(kind: type[Message], data: bytes) -> Message | None:
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


async def in_parts(kind: type[Any], data: bytes) -> Message | OutboxError | None:
    try:
        found: Message = await Decoder().decode(kind, data)
    except DecodeError:
        return None
    except OutboxError as error:
        return error
    return found


@pytest.mark.parametrize("damaged", [False, True], ids=["valid", "damaged"])
async def test_random_bytes_are_the_same_message_in_parts(damaged: bool) -> None:
    compared = 0
    for kind in requests():
        for seed in range(INPUTS):
            name = kind.DESCRIPTOR.name
            random = Random(f"{name} {seed}")
            wire = RandomFields(random, damaged=damaged)
            data = wire.message(kind.DESCRIPTOR) + wire.field(2_000, DELIMITED, bytes(AT_ONCE))
            if damaged and seed % 2:
                data = data[: random.randint(AT_ONCE, len(data))]
            expected, found = at_once(kind, data), await in_parts(kind, data)
            if isinstance(found, OutboxError):
                # A list above its limit, maybe in a choice that a later field replaces.
                assert "must have at most" in str(found)
                continue
            assert (found is None) == (expected is None), (name, seed)
            if found is not None and expected is not None:
                compared += 1
                assert found.SerializeToString(deterministic=True) == expected.SerializeToString(
                    deterministic=True
                ), (name, seed)
    assert compared > len(requests()) * INPUTS // 4
