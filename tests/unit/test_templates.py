from __future__ import annotations

import liquid
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox_server.shared.errors import InvalidInput
from outbox_server.shared.templates.batch import (
    BatchTemplate,
    RenderError,
    decode_variables,
    encode_variables,
    missing_column,
    variable_name,
)

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)


def refusal(subject: str | None, body: str | None, html: str | None) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        BatchTemplate.compile(subject, body, html)
    return caught.value


@pytest.mark.parametrize(
    ("column", "name"),
    [
        ("First Name", "first_name"),
        ("FirstName", "firstname"),
        ("  E-Mail Address ", "e_mail_address"),
        ("2nd item (EUR)", "_2nd_item_eur"),
        ("Straße", "straße"),
        ("Pre\u0301nom", "prénom"),
        ("already__an_identifier_", "already__an_identifier_"),
        ("***", ""),
        ("", ""),
    ],
)
def test_a_column_has_one_variable_name(column: str, name: str) -> None:
    assert variable_name(column) == name


def test_every_variable_name_is_valid_in_liquid() -> None:
    for column in ("First Name", "2nd item", "Straße", "名前", "имя отчество"):
        name = variable_name(column)
        template = BatchTemplate.compile("x", f"{{{{ {name} }}}}", None)
        assert name in template.variable_names
        assert template.render({name: "v"}).body == "v"


def test_subject_and_text_are_plain_and_html_is_escaped() -> None:
    template = BatchTemplate.compile("{{ a }}", "{{ a }}", "<b>{{ a }}</b>")
    rendered = template.render({"a": "<&'\">"})
    assert rendered.subject == rendered.body == "<&'\">"
    assert rendered.html == "<b>&lt;&amp;&#39;&#34;&gt;</b>"


def test_a_filter_escapes_in_html_and_not_in_plain_text() -> None:
    source = "{{ a | newline_to_br }}"
    rendered = BatchTemplate.compile("s", source, source).render({"a": "<b>\nc"})
    assert rendered.body == "<b><br />\nc"
    assert rendered.html == "&lt;b&gt;<br />\nc"


def test_without_a_template_the_column_is_used_unchanged() -> None:
    template = BatchTemplate.compile(None, None, None)
    values = {"subject": "{{ x }}", "body": "{{ y }} {%", "html": "<b>{{ z }}</b>"}
    assert template.variable_names == ("body", "html", "subject")
    assert template.required == {"subject"}
    assert template.render(values)[:3] == ("{{ x }}", "{{ y }} {%", "<b>{{ z }}</b>")


def test_an_empty_html_cell_means_no_html() -> None:
    template = BatchTemplate.compile("s", None, None)
    assert template.render({"body": "b", "html": ""})[:3] == ("s", "b", None)
    assert template.render({"body": "", "html": "h"})[:3] == ("s", None, "h")
    with pytest.raises(RenderError) as caught:
        template.render({"body": "", "html": ""})
    assert caught.value.reason == "NO_CONTENT"


@pytest.mark.parametrize(
    ("field", "source", "place"),
    [
        ("body", "a\nbc {{ x", "line 2, column 4"),
        ("html", "<p>\n\n  {{ x | nosuch }}", "line 3, column 10"),
        ("body", "{% if x %}", "line 1, column 1"),
        ("subject", "{{ a b }}", "line 1, column 6"),
        ("body", "{% include 'x' %}", "unexpected tag 'include'"),
        ("body", "{% break %}", "line 1, column 4: unexpected tag 'break'"),
        ("body", "{% render 'x' %}", "unexpected tag 'render'"),
        ("html", "{{ x | safe }}", "unknown filter 'safe'"),
        ("body", "{{ [column] }}", "cannot be computed"),
        ("body", "{% for i in (1..x) %}{{ i | nosuch }}{% endfor %}", "unknown filter"),
    ],
)
def test_a_template_that_does_not_parse_is_refused_with_the_position_of_the_error(
    field: str, source: str, place: str
) -> None:
    sources = {"subject": "s", "body": "b", "html": "h", field: source}
    error = refusal(sources["subject"], sources["body"], sources["html"])
    assert error.reason == "TEMPLATE_INVALID"
    assert [violation.field for violation in error.violations] == [field]
    assert place in error.message


def test_a_template_over_256_kib_is_refused() -> None:
    BatchTemplate.compile("s", "x" * 256 * 1024, None)
    error = refusal("s", "é" * (128 * 1024 + 1), None)
    assert error.reason == "TEMPLATE_TOO_LARGE"


@pytest.mark.parametrize(
    ("source", "names", "required"),
    [
        ("{{ a }}", {"a"}, {"a"}),
        ("{{ a | upcase }}", {"a"}, {"a"}),
        ("{{ a.size }}", {"a"}, {"a"}),
        ("{{ a | default: 'x' }}", {"a"}, set()),
        ("{{ a | upcase | default: 'x' }}", {"a"}, set()),
        ("{{ a | default: b }}", {"a", "b"}, {"b"}),
        ("{{ a | default: 'x' }} {{ a }}", {"a"}, {"a"}),
        ("{% if a %}{{ a }}{% endif %}", {"a"}, set()),
        ("{% if a %}{{ a }}{% else %}{{ b }}{% endif %}", {"a", "b"}, {"b"}),
        ("{% if a %}x{% elsif b %}{{ b }}{% endif %}", {"a", "b"}, set()),
        ("{% unless a %}{{ b }}{% endunless %}", {"a", "b"}, {"b"}),
        ("{% case a %}{% when 'x' %}{{ a }}{% when b %}{{ c }}{% endcase %}", set("abc"), {"c"}),
        ("{% assign a = b | default: 'x' %}{{ a }}", {"b"}, set()),
        ("{% assign a = a | default: 'x' %}{{ a }}", {"a"}, set()),
        ("{% capture a %}{{ b }}{% endcapture %}{{ a }}", {"b"}, {"b"}),
        ("{% for i in a %}{{ i }}{{ forloop.index }}{% endfor %}", {"a"}, {"a"}),
        (
            "{% for i in (1..a) %}{{ i }}{{ b }}{% endfor %}{{ i }}",
            {"a", "b", "i"},
            {"a", "b", "i"},
        ),
        ("{{ a[b] }}", {"a", "b"}, {"a", "b"}),
        ("{% echo a %}{% liquid echo b %}", {"a", "b"}, {"a", "b"}),
        ('{{ ["limit"] }}', {"limit"}, {"limit"}),
        ("{% comment %}{{ a }}{% endcomment %}{% raw %}{{ b }}{% endraw %}", set(), set()),
    ],
)
def test_a_variable_is_required_unless_each_use_allows_for_its_absence(
    source: str, names: set[str], required: set[str]
) -> None:
    template = BatchTemplate.compile("s", source, "h")
    assert set(template.variable_names) == names
    assert template.required == required


def test_default_replaces_an_absent_column_and_an_empty_cell() -> None:
    template = BatchTemplate.compile("s", 'Dear {{ name | default: "friend" }}', None)
    assert template.render({"html": ""}).body == "Dear friend"
    assert template.render({"name": ""}).body == "Dear friend"
    assert template.render({"name": "Ann"}).body == "Dear Ann"


def test_a_missing_column_that_differs_only_in_case_is_pointed_out() -> None:
    assert "write {{ firstname }}" in missing_column("FirstName", ["firstname"])
    assert 'default: "..."' in missing_column("city", ["email"])


@pytest.mark.parametrize("value", ["a\r\nBcc: x@y.zz", "a\nb", "a\rb"])
def test_a_line_break_in_a_subject_is_refused(value: str) -> None:
    template = BatchTemplate.compile("Hi {{ x }}", "b", None)
    with pytest.raises(RenderError) as caught:
        template.render({"x": value})
    assert caught.value.reason == "SUBJECT_LINE_BREAK"
    assert refusal(value, "b", None).reason == "SUBJECT_LINE_BREAK"


def test_white_space_around_a_subject_is_trimmed() -> None:
    assert BatchTemplate.compile("\n Hi {{ x }}", "b", None).render({"x": "A \n"}).subject == "Hi A"


def test_a_filter_that_fails_is_an_error_of_the_row() -> None:
    template = BatchTemplate.compile("s", "{{ x | base64_decode }}", None)
    for value in ("a", "/w=="):
        with pytest.raises(RenderError) as caught:
            template.render({"x": value})
        assert caught.value.reason == "TEMPLATE_RENDER_FAILED"


@given(st.lists(st.one_of(st.none(), TEXT), max_size=5))
def test_stored_variables_round_trip(values: list[str | None]) -> None:
    names = [f"v{index}" for index in range(len(values))]
    stored = encode_variables(values)
    assert (stored is None) == (not values)
    assert stored is None or ("\n" not in stored and "\0" not in stored)
    expected = {n: v for n, v in zip(names, values, strict=True) if v is not None}
    assert decode_variables(names, stored) == expected


LIQUID = liquid.Environment()
LIQUID_OF_HTML = liquid.Environment(autoescape=True)
PIECES = st.sampled_from(
    [
        "text <b> & ",
        " \n ",
        "{{ a }}",
        "{{- b -}}",
        "{{b}}",
        "{{ a | default: 'x<y' }}",
        "{{ c | default: '' }}",
        "{% comment %}c{% endcomment %}",
        "{% raw %}{{ a }}{% endraw %}",
    ]
)


@given(
    source=st.lists(PIECES, max_size=8).map("".join),
    values=st.dictionaries(st.sampled_from("abc"), TEXT | st.sampled_from(["", " ", "<&>"])),
)
def test_a_spliced_template_renders_the_same_as_liquid(source: str, values: dict[str, str]) -> None:
    template = BatchTemplate.compile("s", source, source)
    rendered = template.render(values)
    assert rendered.body == LIQUID.from_string(source).render(values)
    assert rendered.html == LIQUID_OF_HTML.from_string(source).render(values)
