"""The language of filters: what it accepts, what it means, and what its errors say."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from outbox_server.shared.bounds import MAX_FILTER_DEPTH, MAX_FILTER_TERMS
from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.filters.fields import (
    FieldTest,
    both,
    check_filter,
    earliest,
    latest,
    possible_values,
    required_value,
)
from outbox_server.shared.filters.grammar import (
    AllOf,
    AnyOf,
    Comparison,
    Negation,
    leaves,
    parse_filter,
)
from outbox_server.shared.filters.resources import (
    BATCH_FIELDS,
    JOB_FIELDS,
    JOB_ORDERS,
    check_order,
)
from outbox_server.shared.states import JobState

ALL = frozenset(map(int, JobState))


def tree_of(text: str) -> Any:
    return check_filter(parse_filter(text), JOB_FIELDS)


def is_test(field: str, operator: str, value: object) -> FieldTest:
    return FieldTest(field, operator, value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("  \n", None),
        ("state = FAILED", is_test("state", "=", 4)),
        ("state=failed", is_test("state", "=", 4)),
        ("state = EMAIL_JOB_STATE_FAILED", is_test("state", "=", 4)),
        ("row_number>=10", is_test("row_number", ">=", 10)),
        ("row_number < -1", is_test("row_number", "<", -1)),
        ("batch_id = '17'", is_test("batch_id", "=", 17)),
        ("batch_id != abc", is_test("batch_id", "!=", None)),
        ("recipient = Ann@EXAMPLE.org", is_test("recipient", "=", "Ann@example.org")),
        (r"recipient = '\'a\'@b.org'", is_test("recipient", "=", "'a'@b.org")),
        ("recipient = nobody", is_test("recipient", "=", None)),
        ("NOT state = SENT", Negation(is_test("state", "=", 3))),
        ("-state = SENT", Negation(is_test("state", "=", 3))),
        (
            "create_time >= 2026-12-24T19:00:00+01:00",
            is_test("create_time", ">=", datetime(2026, 12, 24, 18, tzinfo=UTC)),
        ),
        (
            "send_time < '2026-12-24T18:00:00.25z'",
            is_test("send_time", "<", datetime(2026, 12, 24, 18, 0, 0, 250_000, tzinfo=UTC)),
        ),
        (
            "(state = SENT OR state = FAILED) AND row_number < 9",
            AllOf(
                (
                    AnyOf((is_test("state", "=", 3), is_test("state", "=", 4))),
                    is_test("row_number", "<", 9),
                )
            ),
        ),
    ],
)
def test_a_filter_means_its_tree(text: str, expected: object) -> None:
    assert tree_of(text) == expected


@pytest.mark.parametrize(
    ("text", "position", "part"),
    [
        ("state", 6, "expected an operator"),
        ("state = ", 9, "expected a value, got 'the end'"),
        ("state = FAILED AND", 19, "expected a comparison"),
        ("state = FAILED row_number = 1", 16, "expected AND, OR or the end"),
        ("state = FAILED and row_number = 1", 16, "expected AND, OR or the end, got 'and'"),
        ("and state = FAILED", 5, "write AND in capital letters"),
        ("state = SENT OR state = FAILED AND row_number = 1", 32, "add parentheses"),
        ("(state = SENT", 1, "is not closed"),
        ("state = SENT)", 13, "no open parenthesis"),
        ("state = 'SENT", 9, "quote is not closed"),
        ("stat = SENT", 1, "fields are attempt_count, batch_id"),
        ("row_number = 1 AND tags.x = 2", 20, "there is no field 'tags.x'"),
        ("state > SENT", 1, "use = or !="),
        ("state : SENT", 7, "use ="),
        ("state = BOUNCED", 9, "SCHEDULED, SENDING, SENT"),
        ("row_number = ten", 14, "not a whole number"),
        ("row_number = \u0661", 14, "not a whole number"),
        ("create_time > 2026-12-24", 15, "such as 2026-12-24T18:00:00Z"),
        ("create_time > 2026-12-24T18:00:00", 15, "with an offset"),
        ("create_time > 2026-13-24T18:00:00Z", 15, "is not a time"),
        ("create_time > 2026-12-24T18:00:00+01:60", 15, "is not a time"),
        ("create_time > 0001-01-01T00:00:00+09:00", 15, "is not a time"),
        ("= SENT", 1, "expected a comparison"),
        ("state. = SENT", 6, "a name after the point"),
    ],
)
def test_an_error_says_where_and_what_would_be_right(text: str, position: int, part: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        tree_of(text)
    error = caught.value
    assert error.reason == "FILTER_INVALID"
    assert error.message.startswith(f"filter: at character {position}: ")
    assert part in error.message
    assert error.metadata == {"position": str(position)}
    assert [violation.field for violation in error.violations] == ["filter"]


def test_length_depth_and_number_of_comparisons_are_bounded() -> None:
    terms = ["row_number = 1"] * MAX_FILTER_TERMS
    assert len(list(leaves(tree_of(" OR ".join(terms))))) == MAX_FILTER_TERMS
    depth = MAX_FILTER_DEPTH
    assert tree_of("(" * depth + "state = SENT" + ")" * depth) == tree_of("state = SENT")
    for text in (
        " OR ".join([*terms, "row_number = 1"]),
        "(" * (depth + 1) + "state = SENT" + ")" * (depth + 1),
        "NOT " * (depth + 1) + "state = SENT",
        "-" * 3_000,
        "(" * 3_000,
        "row_number = " + "1" * 4_000,
        "state = \0",
    ):
        with pytest.raises(InvalidInput) as caught:
            tree_of(text)
        assert caught.value.reason == "FILTER_INVALID"


_words = st.sampled_from(
    ["state", "=", "!=", "SENT", "AND", "OR", "NOT", "-", "(", ")", "'", '"', "\\", ".", "1", ":"]
)


@given(st.lists(_words | st.text(max_size=3), max_size=60).map(" ".join))
@example("'" * 99)
def test_any_text_is_a_filter_or_an_error_at_one_of_its_characters(text: str) -> None:
    wrong = None
    try:
        tree_of(text)
    except InvalidInput as error:
        wrong = error
    if wrong is not None:
        assert wrong.reason == "FILTER_INVALID"
        place = r"filter: (?:at character (\d+): |contains a control character)"
        found = re.match(place, wrong.message)
        assert found is not None
        assert 1 <= int(found[1] or 1) <= len(text) + 1


def as_text(tree: Any) -> str:
    match tree:
        case Comparison():
            return f"{tree.field} {tree.operator} {tree.value}"
        case Negation(term):
            return f"NOT ({as_text(term)})"
        case AllOf(terms):
            return " AND ".join(f"({as_text(term)})" for term in terms)
        case AnyOf(terms):
            return " OR ".join(f"({as_text(term)})" for term in terms)
    raise AssertionError(tree)


_leaf = st.builds(
    lambda operator, state: Comparison("state", operator, state.name, 1, 1),
    st.sampled_from(["=", "!="]),
    st.sampled_from(list(JobState)),
) | st.just(Comparison("row_number", "<", "5", 1, 1))
_trees: st.SearchStrategy[Any] = st.recursive(
    _leaf,
    lambda inner: (
        st.builds(Negation, inner)
        | st.builds(lambda a, b: AllOf((a, b)), inner, inner)
        | st.builds(lambda a, b: AnyOf((a, b)), inner, inner)
    ),
    max_leaves=8,
)


def holds(tree: Any, state: int, row_number: int) -> bool:
    match tree:
        case Comparison("row_number"):
            return row_number < 5
        case Comparison():
            return (JobState[tree.value] == state) == (tree.operator == "=")
        case Negation(term):
            return not holds(term, state, row_number)
        case AllOf(terms):
            return all(holds(term, state, row_number) for term in terms)
        case AnyOf(terms):
            return any(holds(term, state, row_number) for term in terms)
    raise AssertionError(tree)


@given(_trees)
def test_the_states_that_a_match_can_have_leave_out_none(tree: Any) -> None:
    try:
        checked = tree_of(as_text(tree))
    except InvalidInput:
        return  # nested too deep
    possible = possible_values(checked, "state", ALL)
    matching = {s for s in ALL if holds(tree, s, 1) or holds(tree, s, 9)}
    assert matching <= possible


def test_states_are_narrowed_through_and_or_and_not() -> None:
    for text, states in (
        ("row_number = 1", ALL),
        ("state = SENT", {3}),
        ("state != SENT", ALL - {3}),
        ("NOT (state = SENT OR state = FAILED)", ALL - {3, 4}),
        ("state = SENT AND row_number = 1", {3}),
        ("state = SENT AND state = FAILED", set()),
        ("NOT (state = SENT AND row_number = 1)", ALL),
    ):
        assert possible_values(tree_of(text), "state", ALL) == states, text


def test_a_filter_tells_the_one_value_and_the_times_that_all_matches_have() -> None:
    tree = tree_of(
        "batch_id = 7 AND (create_time > 2026-01-02T00:00:00Z"
        " AND create_time < 2027-01-01T00:00:00Z) AND create_time >= 2026-01-01T00:00:00Z"
    )
    assert required_value(tree, "batch_id") == (True, 7)
    assert required_value(tree, "sender_id") == (False, None)
    assert earliest(tree, "create_time") == datetime(2026, 1, 2, tzinfo=UTC)
    assert latest(tree, "create_time") == datetime(2027, 1, 1, tzinfo=UTC)
    either = tree_of("batch_id = 7 OR create_time > 2026-01-02T00:00:00Z")
    assert required_value(either, "batch_id") == (False, None)
    assert earliest(either, "create_time") is None
    assert required_value(both(either, is_test("batch_id", "=", 8)), "batch_id") == (True, 8)


def test_each_list_has_its_own_fields_and_states() -> None:
    done = check_filter(parse_filter("state = DONE"), BATCH_FIELDS)
    assert done == is_test("state", "=", 3)
    with pytest.raises(InvalidInput, match="is not one of ACTIVE, CANCELLED, DONE"):
        check_filter(parse_filter("state = FAILED"), BATCH_FIELDS)


def test_an_order_is_one_of_the_list() -> None:
    assert check_order("", JOB_ORDERS) == ("create_time", False)
    assert check_order(" create_time  asc", JOB_ORDERS) == ("create_time", False)
    assert check_order("schedule_time desc", JOB_ORDERS) == ("schedule_time", True)
    for wrong in ("recipient", "create_time DESC", "create_time, row_number", "desc"):
        with pytest.raises(InvalidInput, match="must be one of: create_time, ") as caught:
            check_order(wrong, JOB_ORDERS)
        assert caught.value.reason == "ORDER_BY_INVALID"
