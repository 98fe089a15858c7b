"""A row that is proven can be rendered, and the usual templates are proven."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from outbox_server.shared.templates.batch import BatchTemplate, encode_variables
from outbox_server.shared.templates.checking import failure_of, is_proven
from outbox_server.shared.templates.source import SourceSummary

PIECES = st.sampled_from(
    [
        "text ß\n",
        "{{ a }}",
        "{{ a | upcase }}",
        "{{ b | strip | capitalize | truncate: 5 }}",
        "{{ a | append: b | prepend: '<' }}",
        "{{ c | default: a }}",
        "{{ c | default: }}",
        "{{ 'ŉ' | upcase }}",
        "{{ now }}",
        "{{ now | date: '%Y-%m-%d' | upcase }}",
        "{{ today | date: '%c' }}",
        "{% if a > 5 %}x{% endif %}",
        "{% if 5 >= b and a %}x{% elsif a == 5 or c != b %}{{ b }}{% else %}y{% endif %}",
        "{% unless a < b %}{{ a }}{% endunless %}",
        "{% if a contains b %}x{% endif %}",
        "{% if a > 'x' %}x{% endif %}",
        "{% if a == nil or b == true %}x{% endif %}",
        "{{ a | plus: 1 | times: b | round }}",
        "{{ a | minus: 0.5 | ceil | append: '!' }}",
        "{{ 5 | times: a | times: a | times: a }}",
        "{{ a | divided_by: 3 | abs }}",
        # These are never proven.
        "{{ a | divided_by: 0 }}",
        "{{ a | upcase | plus: 1 }}",
        "{{ a | plus: 'x' }}",
        "{{ a | divided_by: b }}",
        "{{ a | date: '%Y' }}",
        "{{ b | base64_decode }}",
        "{{ now | date: '%10Y' }}",
        "{{ a.size }}",
        "{% if now > 5 %}x{% endif %}",
        "{% if 'x' > 5 %}x{% endif %}",
        "{% assign d = a %}{{ d }}",
        "{% for i in (1..a) %}x{% endfor %}",
        "{{ a | truncate: b }}",
        "{{ a | upcase: b }}",
        "{{ a | newline_to_br }}",
        "{% case a %}{% when 5 %}x{% endcase %}",
    ]
)
NUMBERS = ["5", "-1.5", "5.", "1e5", "9" * 30, "9" * 200, "0." + "9" * 30]
CELL = st.none() | st.sampled_from(
    ["", " ", "x", "Ü<&ß", "a\nb", "a\r", "\u0390" * 90, "x" * 998, *NUMBERS]
)


@given(
    subject=st.none() | st.lists(PIECES, min_size=1, max_size=2).map("".join),
    body=st.lists(PIECES, min_size=1, max_size=4).map("".join),
    html=st.none() | st.lists(PIECES, min_size=1, max_size=3).map("".join),
    cells=st.tuples(CELL, CELL, CELL),
    most=st.sampled_from([1_024, 100_000]),
)
@example("{{ a | upcase }}", "{{ a }}", None, ("ΐ" * 90, None, None), 100_000)
@example("{{ a | upcase }}", "{{ a }}", None, ("x" * 998, None, None), 100_000)
@example("{{ a | upcase }} x", "{{ a }}", None, ("a\nb", None, None), 100_000)
@example("{{ a | upcase }}\n.", "{{ a }}", None, ("a", None, None), 100_000)
@example(None, "{% if a > 5 %}x{% endif %}", None, ("x", None, None), 100_000)
@example(None, "{{ a | times: b | round }}", None, ("9" * 5_000, "2", None), 100_000)
@example(None, "{{ a | upcase | append: a }}", None, ("x" * 998, None, None), 1_024)
def test_a_row_that_is_proven_can_be_rendered(
    subject: str | None,
    body: str,
    html: str | None,
    cells: tuple[str | None, str | None, str | None],
    most: int,
) -> None:
    try:
        template = BatchTemplate.compile(subject or "s{{ a | upcase }}", body, html)
    except Exception:  # noqa: BLE001 - such a template is refused before any row
        return
    names = ("a", "b", "c")
    variables = encode_variables(cells)
    if is_proven(template, names, variables, most):
        assert failure_of(template, names, variables, most) is None


@pytest.mark.parametrize(
    ("body", "cells", "proven"),
    [
        ("{% if a %}Dear {{ a | capitalize }}{% else %}Hello{% endif %}", ("Ann", "", ""), True),
        ("{% if a > 100 %}gold{% endif %}", ("120", "", ""), True),
        ("{% if a > 100 %}gold{% endif %}", (None, "", ""), True),
        ("{% if a > 100 %}gold{% endif %}", ("", "", ""), False),
        ("{% if a > 100 %}gold{% endif %}", ("many", "", ""), False),
        ("{{ now | date: '%Y' }}", (None, None, None), True),
        ("{{ a | divided_by: 2 | plus: b }}", ("4", "3", ""), True),
        ("{{ a | divided_by: 2 | plus: b }}", ("4", "", ""), False),
        ("{{ a | divided_by: b }}", ("4", "2", ""), False),
        ("{{ a | plus: 1 | plus: 1 | plus: 1 | plus: 1 | plus: 1 }}", ("4", "", ""), False),
        ("{{ a | upcase }}", ("x" * 70_000, "", ""), False),
        ("{{ a | upcase }}" * 1_000, ("x" * 3_000, "", ""), False),
    ],
)
def test_usual_templates_are_proven(body: str, cells: tuple[str | None, ...], proven: bool) -> None:
    template = BatchTemplate.compile("Hello {{ b | default: 'you' | capitalize }}", body, None)
    variables = encode_variables(cells)
    assert is_proven(template, ("a", "b", "c"), variables, 10_000_000) is proven


def test_a_proof_survives_the_way_from_a_worker() -> None:
    template = BatchTemplate.compile("s", "{% if a > 1 %}{{ b }}{% endif %}", None)
    (proof,) = template.proofs
    assert (proof.numbers, proof.uses) == (frozenset({"a"}), 2)
    summary = SourceSummary(frozenset("ab"), frozenset(), False, False, proof=proof)
    assert SourceSummary.from_wire(summary.to_wire()) == summary
    with pytest.raises(ValueError, match="not a proof"):
        SourceSummary.from_wire([*summary.to_wire()[:-1], ["a", 1]])
