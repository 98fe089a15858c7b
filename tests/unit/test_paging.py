"""How a list method divides its rows into pages."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outbox.v1.sender_service_pb2 import ListSendersRequest

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.rpc.page_tokens import digest_filters, encode
from outbox_server.shared.rpc.paging import Page, requested_page


def ask(page_size: int = 0, token: str = "", user_id: str = "ann") -> Page[tuple[int]]:
    request = ListSendersRequest(page_size=page_size, page_token=token)
    return requested_page(request, "senders", user_id, start=(0,))


def read(rows: Sequence[int], page: Page[tuple[int]]) -> Sequence[int]:
    """Read rows as the statement of a list method does."""
    return [row for row in rows if row > page.after[0]][: page.limit]


@given(
    rows=st.lists(st.integers(1, 500), unique=True, max_size=40).map(sorted),
    size=st.integers(1, 45),
)
def test_paging_through_a_list_returns_each_row_once_and_in_order(
    rows: list[int], size: int
) -> None:
    seen: list[int] = []
    token, pages = "", 0
    while token or not pages:
        page = ask(size, token)
        shown, token = page.cut(read(rows, page), lambda row: (row,))
        assert len(shown) == size or not token
        seen += shown
        pages += 1
    assert seen == rows
    assert pages == max(-(-len(rows) // size), 1)


def test_a_page_that_ends_with_the_last_row_has_no_next_page() -> None:
    assert ask(2).cut([1, 2], lambda row: (row,)) == ([1, 2], "")


def test_the_first_page_begins_at_the_start_and_has_50_rows_by_default() -> None:
    page = ask()
    assert (page.after, page.size, page.limit) == ((0,), 50, 51)


def test_a_negative_page_size_is_refused() -> None:
    assert reason_of(page_size=-1) == "PAGE_SIZE_INVALID"


@pytest.mark.parametrize("position", [("x",), (1, 2), (1.5,), (True,), ()])
def test_a_token_whose_position_has_another_shape_is_refused(position: tuple[int]) -> None:
    token = encode("senders", digest_filters("ann"), position)
    assert reason_of(token=token) == "PAGE_TOKEN_INVALID"


def test_a_page_token_of_other_filters_is_refused() -> None:
    _, token = ask(1).cut([1, 2], lambda row: (row,))
    assert ask(1, token).after == (1,)
    assert reason_of(token=token, user_id="bob") == "PAGE_TOKEN_INVALID"


def test_a_page_token_of_the_first_release_whose_lists_had_no_filters_remains_valid() -> None:
    # As that release made it.
    token = "t5XcWT70XNvgWzdd"
    request = ListSendersRequest(user_id="ann", page_token=token)
    assert requested_page(request, "senders", "ann", request.state, start=(0,)).after == (7,)
    for text, order in (("state = ACTIVE", ""), ("", "create_time")):
        other = ListSendersRequest(user_id="ann", page_token=token, filter=text, order_by=order)
        with pytest.raises(InvalidInput):
            requested_page(other, "senders", "ann", other.state, start=(0,))


def reason_of(page_size: int = 0, token: str = "", user_id: str = "ann") -> str:
    with pytest.raises(InvalidInput) as caught:
        ask(page_size, token, user_id)
    return caught.value.reason
