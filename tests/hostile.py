"""Requests made from the descriptors alone: valid, invalid and hostile values in every field."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Final

from google.api.field_behavior_pb2 import FieldBehavior, field_behavior
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from tests.hostile_shapes import hostile_texts

MOST_DEPTH: Final = 5

TEXTS: Final = (
    "",
    " ",
    "0",
    "-1",
    "1e9",
    "0x1",
    "1 ",
    "\u0661",
    "9223372036854775807",
    "9223372036854775808",
    "99999999999999999999999999",
    "\x00",
    "a\x00b",
    "a\r\nBcc: eve@example.com",
    "'; DROP TABLE email_jobs; --",
    "%s %(x)s {0} ${x}",
    "../../etc/passwd",
    "\u202e\u2028\ufeff",
    "\ud7ff\U0010ffff",
    "🎉" * 50,
    "a" * 129,
    "a" * 20_000,
    "{{ name }}",
    "{{ name | ",
    "{% for i in (1..99999999) %}x{% endfor %}",
    "{{ 'x' | times: 1e308 | append: '" + "y" * 500 + "' }}",
    "a@b.org",
    "A@B.ORG",
    "@",
    "a@b@c",
    "a@" + "b" * 300 + ".org",
    '"a b"@example.com',
    "ünï@exämple.com",
    "Europe/Berlin",
    "Mars/Olympus",
    "../UTC",
    "2026-02-30T00:00:00Z",
    "127.0.0.1",
    "::1",
    "eyJhIjoxfQ",
    "AAAA",
    *hostile_texts(1_000),
)
BYTES: Final = (
    b"",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x00" * 40,
    b"email\n",
    b"email\na@b.org\n",
    b"email,name\na@b.org,Ann\nbroken\n,,,\n",
    b"email;name\r\na@b.org;Ann\r\n",
    "email,name\na@b.org,Zoë\n".encode("utf-16"),
    b'email,"name\na@b.org,x\n',
    b"name\nAnn\n",
    b"email,email\na@b.org,c@d.org\n",
    b"email,limit\na@b.org,1\n\xc3\x28,2\n",
    b"email,x\na@b.org," + b"y" * 100_000 + b"\n",
    *(b"email,name\na@b.org," + text.encode() for text in hostile_texts(1_000)),
)
INTEGERS: Final = (0, 1, 2, 3, 7, 50, 1000, 1001, 65_535, 65_536, -1, 2**31 - 1, -(2**31))
LONG_INTEGERS: Final = (*INTEGERS, 2**32, 2**53 + 1, 2**63 - 1, -(2**63))
NUMBERS: Final = (0.0, -0.0, 1.5, -1.0, 1e308, float("inf"), float("-inf"), float("nan"))

# Values for the fields of messages that have a special meaning in protobuf.
_WELL_KNOWN: Final[Mapping[str, Sequence[Mapping[str, Any]]]] = {
    "google.protobuf.Timestamp": (
        {},
        {"seconds": 1_900_000_000},
        {"seconds": 1, "nanos": 999_999_999},
        {"seconds": 253_402_300_799, "nanos": 999_999_999},
        {"seconds": 253_402_300_800},
        {"seconds": -62_135_596_801},
        {"seconds": 2**63 - 1},
        {"seconds": 5, "nanos": -1},
        {"nanos": 2**31 - 1},
    ),
    "google.protobuf.Duration": (
        {},
        {"seconds": 3},
        {"nanos": 1},
        {"seconds": 86_400 * 400},
        {"seconds": -5},
        {"seconds": 5, "nanos": -5},
        {"seconds": 315_576_000_001},
        {"seconds": 2**63 - 1, "nanos": 2**31 - 1},
    ),
}


class Requests:
    """Creates requests; the same seed creates the same requests."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._known: Mapping[str, Sequence[Any]] = {}
        # Whether requests are to succeed.
        self._valid = False
        # How often an optional field is set for which no valid value is known.
        self._optional = 0.3
        # How often a field of a request is invalid. Each request has one of these.
        self._wildness: tuple[float, ...] = (0.0, 0.05, 0.2, 0.9)

    def learn(self, known: Mapping[str, Sequence[Any]]) -> None:
        """Set valid values by field name. The first value of a field suits the first of others."""
        self._known = known

    def prefer_valid(self) -> None:
        """From now on, most requests are to succeed.

        They have few invalid values, few fields whose valid values are unknown, and mostly values
        that suit each other.
        """
        self._valid = True
        self._optional = 0.03
        self._wildness = (0.0, 0.05)

    def message(self, descriptor: Descriptor) -> Message:
        """Return a request that is mostly valid; a few of its fields, or all, may be invalid."""
        wildness = self._chance.choice(self._wildness)
        return self._message(descriptor, wildness, 0)

    def upload(self, descriptor: Descriptor) -> list[Message]:
        """Return a stream's messages, mostly in order, each with one field of the oneof."""
        first, *others = descriptor.fields
        wildness = self._chance.choice((0.0, 0.05, 0.2))
        least = 1 if self._valid else 0
        fields = [first, *self._chance.choices(others, k=self._chance.randint(least, 3))]
        if self._wild(wildness):
            self._chance.shuffle(fields)
        messages = [GetMessageClass(descriptor)() for _ in fields]
        for message, field in zip(messages, fields, strict=True):
            self._fill(message, field, wildness, 0)
        return messages

    def number(self, most: int) -> int:
        """Return a number from 0 to `most`."""
        return self._chance.randint(0, most)

    def damage(self, encoded: bytes) -> bytes:
        """Return changed bytes, which may not be a valid message."""
        damaged = bytearray(encoded or b"\x0a\x01x")
        for _ in range(self._chance.randint(1, 4)):
            damaged[self._chance.randrange(len(damaged))] = self._chance.randrange(256)
        return bytes(damaged[: self._chance.choice((len(damaged), len(damaged) // 2))])

    def _message(self, descriptor: Descriptor, wildness: float, depth: int) -> Message:
        message: Message = GetMessageClass(descriptor)()
        known = _WELL_KNOWN.get(descriptor.full_name)
        if known is not None:
            chosen = self._chance.choice(known if self._wild(wildness) else known[:2])
            return GetMessageClass(descriptor)(**chosen)
        if descriptor.full_name == "google.protobuf.FieldMask":
            paths = ["display_name", "hourly_limit", "min_gap", "max_in_flight", "email"]
            if self._wild(wildness):
                paths += ["*", "", "no_such", "sender_id", "smtp.password", "a.b.c", "\x00"]
            chosen_paths = self._chance.sample(paths, self._chance.randint(0, 3))
            return GetMessageClass(descriptor)(paths=chosen_paths)
        for field in descriptor.fields:
            if depth < MOST_DEPTH and self._chance.random() < self._share(field, wildness):
                self._fill(message, field, wildness, depth)
        return message

    def _share(self, field: FieldDescriptor, wildness: float) -> float:
        """Return how often a field is set: required fields often, output-only fields rarely."""
        if self._wild(wildness):
            return 0.5
        behaviour = field.GetOptions().Extensions[field_behavior]
        if FieldBehavior.REQUIRED in behaviour:
            return 1.0 if self._valid else 0.9
        if field.name in self._known:
            # Some methods refuse a field that another one needs.
            return 0.7 if self._valid else 0.9
        return 0.0 if FieldBehavior.OUTPUT_ONLY in behaviour else self._optional

    def _fill(self, message: Message, field: FieldDescriptor, wildness: float, depth: int) -> None:
        count = self._chance.choice((1, 2, 3, 30))
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            pairs = getattr(message, field.name)
            key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
            for _ in range(count):
                name = self._scalar(key, wildness)
                if value.message_type is not None:
                    pairs[name].CopyFrom(self._message(value.message_type, wildness, depth + 1))
                else:
                    pairs[name] = self._scalar(value, wildness)
        elif field.is_repeated:
            items = getattr(message, field.name)
            for _ in range(count):
                items.append(
                    self._scalar(field, wildness)
                    if entry is None
                    else self._message(entry, wildness, depth + 1)
                )
        elif entry is not None:
            made = self._message(entry, wildness, depth + 1)
            getattr(message, field.name).CopyFrom(made)
        else:
            setattr(message, field.name, self._scalar(field, wildness))

    def _wild(self, wildness: float) -> bool:
        return self._chance.random() < wildness

    def _scalar(self, field: FieldDescriptor, wildness: float) -> Any:
        known = self._known.get(field.name)
        if known and not self._wild(wildness):
            first = self._valid and field.name not in _NEW_EACH_TIME
            # A few methods need another one.
            first = first and self._chance.random() < 0.7
            return known[0] if first else self._chance.choice(known)
        if field.enum_type is not None:
            numbers = [value.number for value in field.enum_type.values]
            return self._chance.choice([*numbers, 99, -1] if self._wild(wildness) else numbers)
        return self._chance.choice(_BY_TYPE[field.type])


# Fields whose value may not be used twice.
_NEW_EACH_TIME: Final = ("request_id",)
_LONG: Final = (FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_SINT64)
_BY_TYPE: Final[Mapping[int, Sequence[Any]]] = {
    FieldDescriptor.TYPE_STRING: TEXTS,
    FieldDescriptor.TYPE_BYTES: BYTES,
    FieldDescriptor.TYPE_BOOL: (False, True),
    FieldDescriptor.TYPE_DOUBLE: NUMBERS,
    FieldDescriptor.TYPE_FLOAT: NUMBERS,
    FieldDescriptor.TYPE_INT32: INTEGERS,
    FieldDescriptor.TYPE_UINT32: tuple(n for n in INTEGERS if n >= 0),
    FieldDescriptor.TYPE_INT64: LONG_INTEGERS,
    FieldDescriptor.TYPE_UINT64: tuple(n for n in LONG_INTEGERS if n >= 0),
}
