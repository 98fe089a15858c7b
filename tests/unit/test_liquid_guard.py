from __future__ import annotations

import time
from contextlib import suppress

import pytest

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.templates.batch import BatchTemplate, RenderError

BIG = "x" * 900_000
# Each of these would take minutes or gigabytes in an unguarded Liquid.
BOMBS = {
    "a range that is joined": "{{ (1..50000000) | join: '' }}",
    "a range from a cell": "{{ (1..n) | join: '' }}",
    "a range that is searched": "{% if (1..50000000) contains 'x' %}a{% endif %}",
    "a range in an assignment": "{% assign r = (1..50000000) %}{{ r | reverse | first }}",
    "a long loop": "{% for i in (1..100000000) %}x{% endfor %}",
    "a long loop over a cell's number": "{% for i in (1..n) %}x{% endfor %}",
    "nested loops": "{% for i in (1..900) %}{% for j in (1..900) %}x{% endfor %}{% endfor %}",
    "a text that doubles": "{% assign s = 'xxxxxxxxxx' %}"
    + "{% assign s = s | append: s %}" * 40
    + "{{ s }}",
    "a text that is multiplied by replace": "{{ big | replace: 'x', big }}",
    "replace of nothing": "{{ big | replace: '', big }}",
    "a list that doubles": "{% assign l = big | split: 'q' %}"
    + "{% assign l = l | concat: l %}" * 12
    + "{{ l }}",
    "a long separator": "{% assign l = 'a b c d e f g h' | split: ' ' %}{{ l | join: big }}",
    "captures that grow": "{% capture a %}{{ big }}{{ big }}{% endcapture %}"
    + "{% capture a %}{{ a }}{{ a }}{% endcapture %}" * 30
    + "{{ a }}",
    "a number that squares itself": "{% assign n = 99999999 %}"
    + "{% assign n = n | times: n %}" * 40
    + "{{ n }}",
    "a number with a huge exponent": "{{ '1e99999999' | times: 3 | ceil }}",
    "a case that renders many times": "{% case 1 %}{% when 1,1,1,1,1,1,1,1,1,1 %}" * 15
    + "{{ big }}{{ big }}" * 20
    + "{% endcase %}" * 15,
    "a date of any width": "{{ 'today' | date: '%999999999d' }}",
    "a date of any width, from a cell": "{{ 'today' | date: width }}",
    "a date parsed from a long text": "{% assign d = big | append: '1' %}{{ d | date: '%Y' }}",
    "tags stripped from a long text": "{{ tags | strip_html }}",
    "much work in a loop": "{% for i in (1..1000) %}{{ big | upcase | size }}{% endfor %}",
    "deep nesting": "{% if true %}" * 300 + "{% endif %}" * 300,
}
VALUES = {
    "big": BIG,
    "n": "99999999999999999999999999",
    "width": "%0999999999d",
    "tags": "<!--" * 99999,
}


@pytest.mark.parametrize("name", BOMBS)
def test_an_endless_template_is_stopped_at_once(name: str) -> None:
    # CPU time of this process: a busy machine does not increase it.
    start = time.thread_time()
    reason = ""
    try:
        BatchTemplate.compile("s", BOMBS[name], None).render(VALUES)
    except (RenderError, InvalidInput) as error:
        reason = error.reason
    assert reason in {"TEMPLATE_LIMIT", "TEMPLATE_INVALID"}
    # A hundred times longer than they take here; without the guard they take minutes.
    assert time.thread_time() - start < 10


def test_a_case_renders_its_block_once_even_if_several_values_match() -> None:
    source = "{% case x %}{% when '1', y, '1' %}one{% when '2' %}two{% else %}else{% endcase %}"
    template = BatchTemplate.compile("s", source, None)
    assert template.render({"x": "1", "y": "1"}).body == "one"
    assert template.render({"x": "2", "y": "1"}).body == "two"
    assert template.render({"x": "3", "y": "1"}).body == "else"


def test_a_cell_of_200_kb_goes_through_filters_and_loops() -> None:
    cell = "word " * 40_000
    source = "{{ x | strip | upcase }}{% for i in (1..3) %}{{ x }}{% endfor %}"
    rendered = BatchTemplate.compile("s", source, None).render({"x": cell})
    assert rendered.body == cell.strip().upper() + 3 * cell


def test_a_stopped_rendering_does_not_affect_the_next() -> None:
    template = BatchTemplate.compile("s", "{% for i in (1..n) %}{{ x | upcase }}{% endfor %}", None)
    with pytest.raises(RenderError):
        template.render({"n": "1000", "x": BIG})
    assert template.render({"n": "2", "x": "a"}).body == "AA"


@pytest.mark.parametrize("name", ["__class__", "x.__class__", "x['__class__']", "x.upper"])
def test_a_template_sees_only_the_row(name: str) -> None:
    source = f"[{{{{ {name} | default: '' }}}}]"
    assert BatchTemplate.compile("s", source, None).render({"x": "v"}).body == "[]"


@pytest.mark.parametrize(
    "source",
    [
        "{{ x }}",
        "{{ x | url_decode }}",
        "{{ x | escape_once }}",
        "{{ x | base64_decode }}",
        "{{ '<b>' | append: x }}",
        "{{ '<b>a' | replace: 'a', x }}",
        "{{ x | newline_to_br }}",
        "{{ x | strip_html }}",
        "{% capture y %}{{ x }}{% endcapture %}{{ y | url_decode }}",
        "{% capture y %}{{ x }}{% endcapture %}{{ y | strip_html }}",
        "{% assign y = x | split: ',' %}{{ y | join: '<br>' }}{{ y }}",
        "{% for c in x %}{{ c }}{% endfor %}",
        "{% cycle x, 'b' %}",
    ],
)
def test_no_cell_becomes_markup(source: str) -> None:
    template = BatchTemplate.compile("s", None, source)
    values = ("<script>", "&lt;script&gt;", "%3Cscript%3E", "PHNjcmlwdD4=", "<<b>script>")
    for value in (*values, "a,<script>"):
        with suppress(RenderError):
            html = template.render({"x": value}).html
            assert html is not None, value
            assert "<script" not in html, value
