"""Decodes requests: a large one in small parts, so that no request stops the event loop.

A request of 5 MiB may have 2.5 million empty entries. Decoded at once, it would stop all calls for
up to a second and take 200 MB. Here other calls run after each part, and a list that has more
entries than its limit is refused with the part in which it exceeds it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import cache
from typing import Any, Final, TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from outbox_server.shared.callers import next_part
from outbox_server.shared.rpc.field_limits import FieldLimit, limit_of

_Kind = TypeVar("_Kind", bound=Message)

# A request of up to this size, in bytes, is decoded at once: that takes a few milliseconds.
AT_ONCE: Final = 16 * 1024
# A part ends after this number of fields or bytes.
_PART_FIELDS: Final = 500
_PART_BYTES: Final = 64 * 1024
# The maximum number of fields of a large message that are not entries of its lists. A message that
# sets a number a million times would take a second.
_MOST_SINGLE: Final = 10_000
# The types of fields on the wire.
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
# The types of fields, as the contract names them, of which each entry is a field on the wire.
_UNPACKED: Final = (
    FieldDescriptor.TYPE_STRING,
    FieldDescriptor.TYPE_BYTES,
    FieldDescriptor.TYPE_MESSAGE,
)
# The maximum number of bytes of a number, and of a tag or a size. A byte with this bit is followed
# by another.
_MAX_VARINT: Final = 10
_MAX_SHORT: Final = 5
_MORE: Final = 0x80


class Decoder:
    """Decodes the requests of a server, one part of one request at a time."""

    def __init__(self) -> None:
        # Requests take turns. Otherwise many large requests would delay small calls as much as one
        # that is decoded in one piece.
        self._turn = asyncio.Lock()

    async def decode(self, kind: type[_Kind], data: bytes) -> _Kind:
        """Return the message of this kind.

        Raises:
            DecodeError: the bytes are not such a message.
            InvalidInput: a list has more entries than its limit.
        """
        if len(data) <= AT_ONCE:
            return kind.FromString(data)
        message = kind()
        # A view, because copies of large parts take time as well.
        await self._merge(message, memoryview(data), "")
        return message

    async def _merge(self, message: Message, data: memoryview, prefix: str) -> None:
        """Merge the bytes into the message. `prefix` is the path of the message's fields."""
        fields = message.DESCRIPTOR.fields_by_number
        begun = at = count = single = 0
        while at < len(data):
            tag_at = at
            tag, at = _varint(data, at, _MAX_SHORT)
            size, at = _size(data, at, tag & 7)
            body, at = at, at + size
            if at > len(data):
                raise DecodeError
            field: Any = fields.get(tag >> 3)
            if field is None or not field.is_repeated:
                single += 1
                if single > _MOST_SINGLE:
                    raise DecodeError
            if size > _PART_BYTES and tag & 7 == _DELIMITED and field is not None:
                if _has_fields(field):
                    await self._part(message, data[begun:tag_at], prefix)
                    inner = _entered(message, field)
                    await self._merge(inner, data[body:at], f"{prefix}{field.name}.")
                    begun, count = at, 0
                    continue
                _check_packed(field, size, prefix)
            count += 1
            if count >= _PART_FIELDS or at - begun >= _PART_BYTES:
                await self._part(message, data[begun:at], prefix)
                begun, count = at, 0
        await self._part(message, data[begun:], prefix)

    async def _part(self, message: Message, part: memoryview, prefix: str) -> None:
        await next_part()
        async with self._turn:
            # It takes any bytes-like object. Only the part is copied.
            message.MergeFromString(cast("bytes", part))
            await asyncio.sleep(0)
        for name, limit in _limits_of_lists(message.DESCRIPTOR).items():
            got = len(getattr(message, name))
            if got > limit.most:
                raise limit.error(f"{prefix}{name}", got, at_least=True)


def _varint(data: memoryview, at: int, most: int = _MAX_VARINT) -> tuple[int, int]:
    """Return the number at a place, and the place after it."""
    if at < len(data) and data[at] < _MORE:
        return data[at], at + 1
    value = shift = 0
    for place in range(at, min(at + most, len(data))):
        byte = data[place]
        value |= (byte & 0x7F) << shift
        if byte < _MORE:
            return value, place + 1
        shift += 7
    raise DecodeError


def _size(data: memoryview, at: int, wire_type: int) -> tuple[int, int]:
    """Return the size of a field, and the place where it begins."""
    if wire_type == _DELIMITED:
        return _varint(data, at, _MAX_SHORT)
    if wire_type == _VARINT:
        return 0, _varint(data, at)[1]
    if wire_type in (_FIXED64, _FIXED32):
        return 8 if wire_type == _FIXED64 else 4, at
    raise DecodeError  # groups, which no message of the contract has


def _has_fields(field: FieldDescriptor) -> bool:
    inner = field.message_type
    return inner is not None and not inner.GetOptions().map_entry


def _entered(message: Message, field: FieldDescriptor) -> Message:
    """Return the message in a field: a new entry of a list."""
    value: Any = getattr(message, field.name)
    if field.is_repeated:
        added: Message = value.add()
        return added
    inner: Message = value
    inner.SetInParent()
    return inner


def _check_packed(field: FieldDescriptor, size: int, prefix: str) -> None:
    """Check the number of entries of a list of numbers, which takes `size` bytes."""
    limit = _limits_of_lists(field.containing_type).get(field.name)
    if limit is None or field.type in _UNPACKED:
        return
    least = size // _MAX_VARINT
    if least > limit.most:
        raise limit.error(f"{prefix}{field.name}", least, at_least=True)


@cache
def _limits_of_lists(kind: Descriptor) -> Mapping[str, FieldLimit]:
    """Return the limits of the lists and maps whose excess refuses the request, by name."""
    found = {field.name: limit_of(field) for field in kind.fields if field.is_repeated}
    return {name: limit for name, limit in found.items() if limit is not None and not limit.by_row}
