"""Cells that are numbers compare as numbers, and errors of templates are in our words."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.templates.batch import BatchTemplate, RenderError
from outbox_server.shared.templates.plain import plain_source


def rendered(source: str, **values: str) -> str | None:
    return BatchTemplate.compile("s", source, None).render(values).body


def holds(condition: str, **values: str) -> bool:
    return rendered(f"{{% if {condition} %}}yes{{% endif %}}", **values) == "yes"


def failure(source: str, **values: str) -> RenderError:
    template = BatchTemplate.compile("s", source, None)
    with pytest.raises(RenderError) as caught:
        template.render(values)
    return caught.value


@pytest.mark.parametrize(
    ("condition", "values", "expected"),
    [
        ("a > 100", {"a": "120"}, True),
        ("a > 100", {"a": "80"}, False),
        ("100 < a", {"a": "120"}, True),
        ("a >= 100", {"a": "100"}, True),
        ("a <= 99.5", {"a": "99.5"}, True),
        ("a <= 99.4", {"a": "99.5"}, False),
        ("a == 100", {"a": "100"}, True),
        ("a == 100", {"a": "100.0"}, True),
        ("a == 0.1", {"a": "0.1"}, True),
        ("a != 100", {"a": " 100 "}, False),
        ("a <> 100", {"a": "101"}, True),
        ("a == 100", {"a": "a lot"}, False),
        ("a == 100", {"a": ""}, False),
        ("a > b", {"a": "9", "b": "10"}, False),
        ("a > b", {"a": "10", "b": "9"}, True),
        ("a > b", {"a": "pear", "b": "apple"}, True),
        ("a > '9'", {"a": "10"}, True),
        ("a == b", {"a": "01", "b": "1"}, False),
        ("a == '1'", {"a": "01"}, False),
        ("a > -5", {"a": "-4"}, True),
        ("a > 0", {"a": "+.5"}, True),
        ("a > 0", {}, False),
        ("a < 0", {}, False),
        ("a > 5 and b < 5", {"a": "6", "b": "4"}, True),
        ("a > 100 or b == 1", {"a": "6", "b": "1"}, True),
        ("a contains 1", {"a": "31"}, True),
    ],
)
def test_a_cell_that_is_a_number_is_compared_as_one(
    condition: str, values: dict[str, str], expected: bool
) -> None:
    assert holds(condition, **values) is expected


def test_numbers_are_compared_in_every_tag() -> None:
    assert rendered("{% unless a > 5 %}x{% endunless %}", a="3") == "x"
    assert rendered("{% if b %}{% elsif a >= 5 %}x{% endif %}", a="5") == "x"
    assert rendered("{% case a %}{% when 5 %}x{% when 6, 7 %}y{% endcase %}", a="7") == "y"
    assert rendered("{% case 5 %}{% when a %}x{% endcase %}", a="5.0") == "x"
    assert rendered("{% for i in (1..3) %}{% if i > a %}{{ i }}{% endif %}{% endfor %}", a="1") == (
        "23"
    )
    assert rendered("{% assign n = a | plus: 1 %}{% if n > b %}x{% endif %}", a="9", b="9") == "x"


@given(st.integers(-(10**20), 10**20), st.integers(-(10**20), 10**20))
def test_whole_numbers_compare_exactly(left: int, right: int) -> None:
    for operator, expected in (("<", left < right), (">=", left >= right), ("==", left == right)):
        assert holds(f"a {operator} {right}", a=str(left)) is expected


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("", "`a` is empty, so it cannot be compared with a number"),
        (" ", "`a` is empty, so it cannot be compared with a number"),
        ("secret", "`a` is not a number such as 12 or 12.5"),
        ("1,200", "`a` is not a number such as 12 or 12.5"),
        ("1e9", "`a` is not a number"),
        ("٣", "`a` is not a number"),
        ("9" * 31, "`a` is not a number"),
        ("9" * 100_000, "`a` is not a number"),
        ("nan", "`a` is not a number"),
    ],
)
@pytest.mark.parametrize("condition", ["a > 100", "100 >= a", "a <= 1.5"])
def test_a_cell_that_is_no_number_is_named_and_not_repeated(
    condition: str, cell: str, said: str
) -> None:
    error = failure(f"\n {{% if {condition} %}}x{{% endif %}}", a=cell)
    assert (error.reason, error.column) == ("TEMPLATE_RENDER_FAILED", "a")
    assert error.message.startswith("body: line 2, column ")
    assert said in error.message
    assert "secret" not in error.message
    assert len(error.message) < 200


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ 100 | divided_by: a }}", "`divided_by` cannot be used on the values of this row"),
        ("{{ 100 | modulo: a }}", "an empty cell counts as zero"),
        ("{{ b | base64_decode }}", "the filter `base64_decode` cannot be used"),
        ("{{ b | truncate: 'x' }}", "the filter `truncate` cannot be used"),
        ("{{ b | slice }}", "the filter `slice` cannot be used"),
        ("{{ b | replace }}", "the filter `replace` cannot be used"),
        ("{% if now > b %}{% endif %}", "compares values of two kinds"),
        ("{% for i in (1..2000) %}{{ b }}{% endfor %}", "a range is too long"),
        ("{% for i in b limit: c %}{% endfor %}", "the values of this row cannot be used here"),
        ("{% assign n = 1 %}{% if n contains b %}{% endif %}", "cannot be used here"),
    ],
)
def test_a_row_that_a_template_cannot_use_is_refused_in_our_words(source: str, said: str) -> None:
    error = failure(source, a="", b="secret", c="secret")
    assert said in error.message
    assert not re.search(r"secret|str|int|NoneType|expected|argument|found", error.message)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ a b }}", "line 1, column 6: unexpected 'b'"),
        ("a\nbc {{ x", "line 2, column 4: `{{` is not closed by `}}`"),
        ("{% if a", "`{%` is not closed by `%}`"),
        ("{% if x %}", "a block is not closed: `{% endif %}` is missing"),
        ("{% for i in x %}{{ i }}", "`{% endfor %}` is missing"),
        ("{% foo %}", "unexpected tag 'foo'"),
        ("{% else %}", "unexpected tag 'else'"),
        ("{% if %}x{% endif %}", "the tag `if` needs an expression"),
        ("{% if a > %}{% endif %}", "an expression is incomplete"),
        ("{{ x | }}", "an expression is incomplete"),
        ("{{ x | nosuch }}", "unknown filter 'nosuch'"),
        ("{% comment %}", "`{% comment %}` is not closed"),
        ("{% if (a) %}{% endif %}", "unexpected '('"),
        ("{% if a && b %}{% endif %}", "unexpected '&'"),
        ("{{ 'a }}", 'unexpected "\'"'),
        ("{% if true %}" * 30, "its blocks are nested too deeply"),
        ("{{ " + "x" * 100 + " " + "y" * 100 + " }}", "..."),
        ("{{ [a] }}", "cannot be computed"),
    ],
)
def test_a_template_that_does_not_parse_is_described_in_our_words(source: str, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        BatchTemplate.compile("s", source, None)
    message = caught.value.message
    assert said in message
    assert not re.search(r"(?<!un)expected|token|primitive|found|infix|limit", message)
    assert len(message) < 200


@pytest.mark.parametrize("name", ["now", "today"])
def test_the_time_of_sending_needs_no_column(name: str) -> None:
    source = f"{{{{ {name} | date: '%Y-%m-%d' }}}}"
    template = BatchTemplate.compile(f"{{{{ {name} | date: '%Y' }}}}", source, source)
    assert template.required == frozenset()
    before = datetime.now(UTC).astimezone().date()
    text = template.render({}).body
    assert text is not None
    assert before.isoformat() <= text <= datetime.now(UTC).astimezone().date().isoformat()
    assert rendered(f"{{{{ {name} }}}}")
    assert plain_source("body", f"{{{{ {name} }}}}") is None


def test_a_column_called_now_wins_over_the_clock() -> None:
    assert rendered("{{ now }} {{ now | upcase }}", now="soon") == "soon SOON"


def test_a_year_of_now_compares_with_a_number() -> None:
    source = "{% assign year = now | date: '%Y' %}{% if year > 2000 %}x{% endif %}"
    assert rendered(source) == "x"
