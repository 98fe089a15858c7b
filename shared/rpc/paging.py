"""One page of a list method (AIP-158): its size, its start, and the token of the next page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from outbox_server.shared.errors import Violations
from outbox_server.shared.rpc import page_tokens
from outbox_server.shared.rpc.page_tokens import Position

T = TypeVar("T")
P = TypeVar("P", bound=Position)


class ListRequest(Protocol):
    """The fields that the requests of all list methods have."""

    @property
    def page_size(self) -> int:
        """The maximum number of results in one response; 0 means the default."""

    @property
    def page_token(self) -> str:
        """The token from the previous page; empty means the first page."""


@dataclass(frozen=True, slots=True)
class Page(Generic[P]):
    """The page that a caller asks for: the first `size` rows after `after`."""

    kind: str
    filters: bytes
    size: int
    # The position of the last row of the previous page.
    after: P

    @property
    def limit(self) -> int:
        """How many rows to read: one more than the page has, to see if another page follows."""
        return self.size + 1

    def cut(
        self, found: Sequence[T], position_of: Callable[[T], P], reached: P | None = None
    ) -> tuple[Sequence[T], str]:
        """Return the rows of this page and the token of the next one, empty on the last page.

        `found` are the first `limit` rows after `after`. If a search ended with fewer rows
        and before the end, `reached` is the position where it continues.
        """
        shown = found[: self.size]
        following = position_of(shown[-1]) if len(found) > self.size else reached
        if following is None:
            return shown, ""
        return shown, page_tokens.encode(self.kind, self.filters, following)


def requested_page(
    request: ListRequest,
    kind: str,
    *filters: object,
    start: P,
    largest: int = page_tokens.MAX_ID,
) -> Page[P]:
    """Return the page that a request asks for.

    `kind` is the name of the list. `filters` are all values that decide which rows it has, the user
    included (see `digest_filters`), but `filter` and `order_by`, which are read from the request.
    `start` is a position before the first row, and `largest` the largest number that a position can
    have.

    Raises:
        InvalidInput: PAGE_SIZE_INVALID; PAGE_TOKEN_INVALID: the token is not of this list with
            these filters.
    """
    wrong = Violations()
    size = wrong.value(lambda: page_tokens.page_size(request.page_size), 0)
    digest = page_tokens.digest_filters(*filters, *_later_filters(request))
    after = wrong.value(
        lambda: page_tokens.decode(request.page_token, kind, digest, start, largest=largest), start
    )
    wrong.raise_any()
    return Page(kind, digest, size, after)


def _later_filters(request: ListRequest) -> list[tuple[str, str]]:
    """Return the names and values of `filter` and `order_by` that are set.

    Lists got these fields after their first release. An unset one is no part of the digest, so that
    page tokens of releases without it remain valid.
    """
    found = ((name, getattr(request, name, "")) for name in ("filter", "order_by"))
    return [(name, value) for name, value in found if value]
