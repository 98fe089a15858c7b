"""An operator's file of rules for SMTP replies."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

import pytest

from outbox_server.shared.errors import ConfigurationError
from outbox_server.shared.smtp.replies import Meaning, Phase, Reply, ReplyRules
from outbox_server.shared.smtp.reply_rule_file import MAX_FILE_BYTES, MAX_RULES
from outbox_server.shared.states import ReplyClass

FULL = """\
# Our relay's own words.
[[rule]]
name = "relay-is-full"
class = "ACCOUNT"
daily = true
phase = ["MAIL", "RCPT"]
code = [450, "5xx"]
enhanced = ["5.9.*", "4.9.1", "5.8.1xx"]
text = ["Volle Halde", ["kein", "Platz"]]
used = false
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rules.toml"


def load(file: Path, content: str) -> ReplyRules:
    file.write_text(content, encoding="utf-8")
    return ReplyRules.load(str(file))


def error_of(file: Path, content: str | bytes) -> str:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigurationError) as caught:
        ReplyRules.load(str(file))
    return caught.value.message


def rule(**keys: str) -> str:
    """Return a complete rule; a key that ends with an underscore is a keyword of Python."""
    complete = {"name": '"own"', "class_": '"RATE"', "code": "[550]"} | keys
    return "[[rule]]\n" + "".join(f"{k.rstrip('_')} = {v}\n" for k, v in complete.items() if v)


# Valid files ---------------------------------------------------------------------------------


def test_a_rule_of_the_operator_comes_before_the_built_in_rules(file: Path) -> None:
    reply = Reply(Phase.RCPT, 550, "5.1.1", "no such user")
    rules = load(file, rule(class_='"DEFERRED"', enhanced='["5.1.1"]'))

    assert ReplyRules.load("").meaning(reply) == Meaning(ReplyClass.RECIPIENT)
    assert rules.meaning(reply) == Meaning(ReplyClass.DEFERRED)
    assert rules.meaning(reply).rule == "own"
    # All other meanings stay the same.
    assert rules.meaning(Reply(Phase.RCPT, 551, None, "")) == Meaning(ReplyClass.RECIPIENT)


def test_the_first_rule_of_a_file_that_matches_decides(file: Path) -> None:
    rules = load(file, rule(name='"one"') + rule(name='"two"', class_='"DEFERRED"'))

    assert rules.meaning(Reply(Phase.RCPT, 550, None, "")).rule == "one"


def test_a_rule_with_the_name_of_a_built_in_rule_replaces_it(file: Path) -> None:
    rules = load(file, rule(name='"daily-quota-code"', enhanced='["5.9.9"]'))

    assert rules.names.count("daily-quota-code") == 1
    assert rules.meaning(Reply(Phase.BODY, 550, "5.9.9", "")) == Meaning(ReplyClass.RATE)
    assert rules.meaning(Reply(Phase.BODY, 550, "5.4.5", "")) == Meaning(ReplyClass.REFUSED)


def test_a_built_in_rule_can_be_switched_off(file: Path) -> None:
    rules = load(file, '[[rule]]\nname = "daily-quota-code"\nenabled = false\n')

    assert "daily-quota-code" not in rules.names
    assert rules.meaning(Reply(Phase.BODY, 550, "5.4.5", "")) == Meaning(ReplyClass.REFUSED)


def test_a_rule_of_the_operator_can_be_switched_off_and_is_checked(file: Path) -> None:
    reply = Reply(Phase.RCPT, 550, None, "")

    assert load(file, rule(enabled="false")).meaning(reply) == Meaning(ReplyClass.REFUSED)
    assert load(file, rule(enabled="true")).meaning(reply) == Meaning(ReplyClass.RATE)
    assert "line 4" in error_of(file, rule(code="[99]", enabled="false"))


def test_without_any_rule_the_first_digit_decides(file: Path) -> None:
    off = "".join(
        f'[[rule]]\nname = "{name}"\nenabled = false\n' for name in ReplyRules.load("").names
    )
    rules = load(file, off)

    assert rules.names == ()
    for phase in Phase:
        assert rules.meaning(Reply(phase, 450, "4.2.1", "busy")) == Meaning(ReplyClass.TEMPORARY)
        assert rules.meaning(Reply(phase, 550, "5.1.1", "gone")) == Meaning(ReplyClass.REFUSED)


@pytest.mark.parametrize(
    ("reply", "matches"),
    [
        (Reply(Phase.MAIL, 550, "5.9.0", "eine VOLLE\nHALDE!"), True),
        (Reply(Phase.RCPT, 599, "5.9.123", "hier ist kein bisschen platz"), True),
        (Reply(Phase.MAIL, 450, "4.9.1", "Platz? kein!"), True),
        (Reply(Phase.MAIL, 554, "5.8.150", "volle halde"), True),
        (Reply(Phase.MAIL, 554, "5.8.15", "volle halde"), False),
        (Reply(Phase.MAIL, 554, "5.8.1500", "volle halde"), False),
        (Reply(Phase.BODY, 550, "5.9.0", "volle halde"), False),
        (Reply(Phase.MAIL, 451, "4.9.1", "volle halde"), False),
        (Reply(Phase.MAIL, 450, "4.9.2", "volle halde"), False),
        (Reply(Phase.MAIL, 550, None, "volle halde"), False),
        (Reply(Phase.MAIL, 550, "5.9.0", "kein"), False),
        (Reply(Phase.MAIL, 550, "5.9.0", ""), False),
        (Reply(Phase.MAIL, 550, "5.9.0", "volle halde", earlier_mails=1), False),
    ],
)
def test_all_conditions_of_a_rule_must_hold(file: Path, reply: Reply, *, matches: bool) -> None:
    found = load(file, FULL).meaning(reply)

    assert (found.rule == "relay-is-full") is matches
    assert found.daily is matches


def test_a_phrase_that_begins_and_ends_with_a_space_is_a_whole_word(file: Path) -> None:
    rules = load(file, rule(code="", text='[" Full "]'))

    for text in ("full", "is full", "FULL stop", "a full one"):
        assert rules.meaning(Reply(Phase.RCPT, 550, None, text)).rule == "own"
    for text in ("awful", "fuller", "full."):
        assert rules.meaning(Reply(Phase.RCPT, 550, None, text)).rule != "own"


def test_a_session_rule_needs_a_connection_that_has_carried_mail(file: Path) -> None:
    rules = load(file, rule(class_='"SESSION"'))

    assert rules.meaning(Reply(Phase.RCPT, 550, None, "", 1)) == Meaning(ReplyClass.SESSION)
    assert rules.meaning(Reply(Phase.RCPT, 550, None, "")) == Meaning(ReplyClass.REFUSED)
    always = load(file, rule(class_='"SESSION"', used="false"))
    assert always.meaning(Reply(Phase.RCPT, 550, None, "")) == Meaning(ReplyClass.SESSION)


@pytest.mark.parametrize(
    "content", ["", "# nothing yet\n", "\ufeff" + FULL, FULL.replace("\n", "\r\n")]
)
def test_files_with_bom_or_other_line_ends_are_read(file: Path, content: str) -> None:
    file.write_bytes(content.encode())

    assert len(ReplyRules.load(str(file)).names) >= len(ReplyRules.load("").names)


def test_no_rule_turns_a_refusal_into_a_success_or_a_success_into_a_refusal(file: Path) -> None:
    rules = load(file, rule(code='["4xx", "5xx"]'))

    assert rules.meaning(Reply(Phase.BODY, 250, None, "")) == Meaning(ReplyClass.SENT)
    assert "SENT" not in error_of(file, rule(class_='"SENT"')).partition("one of")[2]


# Mistakes ------------------------------------------------------------------------------------

TWO = rule(name='"first"') + "\n# another\n"  # The second rule begins in line 7.


@pytest.mark.parametrize(
    ("bad", "line", "says"),
    [
        (rule(colour='"red"'), 11, "colour: unknown key; a rule has name, class, phase, code"),
        (rule(class_='"FAST"'), 9, 'class: "FAST" is not one of SESSION, ACCOUNT'),
        (rule(class_='"rate"'), 9, 'class: "rate" is not one of'),
        (rule(class_='"SENT"'), 9, 'class: "SENT" is not one of'),
        (rule(class_="5"), 9, "class: 5 is not one of"),
        (rule(class_=""), 7, "a rule needs a class, one of"),
        (rule(name=""), 7, "a rule needs a name of at most 64 lower-case letters"),
        (rule(name='""'), 8, "name: a rule needs a name"),
        (rule(name='"Big Name"'), 8, "name: a rule needs a name"),
        (rule(name='"' + "x" * 65 + '"'), 8, "name: a rule needs a name"),
        (rule(name="7"), 8, "name: a rule needs a name"),
        (rule(name='"first"'), 8, 'name: "first" is already the name of the rule in line 1'),
        (rule(phase='["QUIT"]'), 11, 'phase: "QUIT" is not one of CONNECT, EHLO, STARTTLS, AUTH'),
        (rule(phase='["mail"]'), 11, 'phase: "mail" is not one of CONNECT'),
        (rule(phase='"MAIL"'), 11, "phase: must be a list of 1 to 100 entries"),
        (rule(phase="[]"), 11, "phase: must be a list of 1 to 100 entries"),
        (rule(phase="[[]]"), 11, "phase: [] is not one of CONNECT"),
        (rule(code="[]"), 10, "code: must be a list of 1 to 100 entries"),
        (rule(code=str([550] * 101)), 10, "code: must be a list of 1 to 100 entries"),
        (rule(code="550"), 10, "code: must be a list"),
        (rule(code="[250]"), 10, 'code: 250 is not one of 400 to 599, "4xx", "5xx"'),
        (rule(code="[600]"), 10, "code: 600 is not one of"),
        (rule(code="[55]"), 10, "code: 55 is not one of"),
        (rule(code="[-550]"), 10, "code: -550 is not one of"),
        (rule(code="[550.0]"), 10, "code: 550.0 is not one of"),
        (rule(code="[true]"), 10, "code: True is not one of"),
        (rule(code='["2xx"]'), 10, 'code: "2xx" is not one of'),
        (rule(code='["550"]'), 10, 'code: "550" is not one of'),
        (rule(code="[[550]]"), 10, "code: [550] is not one of"),
        (rule(enhanced='["5.7"]'), 11, 'enhanced: "5.7" is not a code such as "5.4.5"'),
        (rule(enhanced='["2.0.0"]'), 11, 'enhanced: "2.0.0" is not a code such as'),
        (rule(enhanced='["*.7.1"]'), 11, 'enhanced: "*.7.1" is not a code such as'),
        (rule(enhanced='["5.7.1000"]'), 11, 'enhanced: "5.7.1000" is not a code such as'),
        (rule(enhanced='["5.7.1)("]'), 11, 'enhanced: "5.7.1)(" is not a code such as'),
        (rule(enhanced="[5.7]"), 11, "enhanced: 5.7 is not a code such as"),
        (rule(enhanced='["4.7.1"]'), 11, 'enhanced: "4.7.1" does not fit any code of this'),
        (rule(text='[""]'), 11, 'text: "" is not a phrase of 3 to 200 characters'),
        (rule(text='["  a  "]'), 11, 'text: "  a  " is not a phrase'),
        (rule(text='["' + "x" * 201 + '"]'), 11, "is not a phrase of 3 to 200 characters"),
        (rule(text="[3]"), 11, "text: 3 is not a phrase"),
        (rule(text="[[]]"), 11, "text: a list of phrases must have 1 to 100 entries"),
        (rule(text='[["full", [ "up" ]]]'), 11, "text: ['up'] is not a phrase"),
        (rule(text='"full"'), 11, "text: must be a list"),
        (rule(used='"yes"'), 11, "used: must be true or false"),
        (rule(enabled="0"), 11, "enabled: must be true or false"),
        (rule(daily='"true"'), 11, "daily: must be true or false"),
        (rule(daily="true"), 11, "daily: only a rule of class ACCOUNT can be daily"),
        (rule(code=""), 7, "a rule needs at least one of code, enhanced, text"),
        ("[[rule]]\n", 7, "a rule needs a name"),
        (rule(class_="", code="", enabled="false"), 8, 'name: no built-in rule is named "own"'),
        (
            '[[rule]]\nname = "too-fast"\nenabled = false\nused = true\n', 10,
            "used: a rule that is only switched off has no other keys",
        ),
        (rule(phase='[\n  "MAIL",\n  "NO",\n]'), 11, 'phase: "NO" is not one of'),
        ("[rules]\n", 7, 'unknown key "rules"; each rule begins with [[rule]]'),
        ("[[rules]]\n", 7, 'unknown key "rules"'),
        ("[[rule]]\nname = ", 8, "the file, up to its end, is not valid TOML"),
        ("[[rule]]\nname = \n", 8, "column 8: this is not valid TOML"),
        ("[[rule]]\nname = own\n", 8, "column 8: this is not valid TOML"),
        (rule(code="[550"), 10, "the file, up to its end, is not valid TOML"),
        ('[[rule]]\nname = "a"\nname = "b"\n', 9, "this is not valid TOML"),
        ("[rule]\n", 7, "this is not valid TOML"),
    ],
)  # fmt: skip
def test_a_mistake_prevents_the_start_and_its_line_is_named(
    file: Path, bad: str, line: int, says: str
) -> None:
    message = error_of(file, TWO + bad)

    assert message.startswith(f"OUTBOX_REPLY_RULES: {file}, line {line}: "), message
    assert says in message


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ("rule = 5\n", 1, "each rule must begin with a line of its own, [[rule]]"),
        ("\nrule = [{name = 'a'}]\n", 2, "each rule must begin with a line of its own"),
        ('\n"rule" = []\n[x]\n', 3, 'unknown key "x"'),
        (b"# \xff\n", 1, "the file must be UTF-8"),
        (rule().encode() + b"# ok\n# \xe9", 6, "the file must be UTF-8"),
        (rule().encode("utf-16"), 1, "the file must be UTF-8"),
        ("x = " + "[" * 20_000, 1, "lists or tables are nested too deeply"),
        ("x = " + "9" * 5_000, 1, "is not valid TOML"),
        ("\x00", 1, "this is not valid TOML"),
        ("".join(rule(name=f'"r{n}"') for n in range(MAX_RULES + 1)), 2001, "at most 500 rules"),
    ],
    ids=lambda value: ascii(value)[:30],
)  # fmt: skip
def test_a_rules_file_of_the_wrong_structure_is_refused(
    file: Path, content: str | bytes, line: int, says: str
) -> None:
    message = error_of(file, content)

    assert message.startswith(f"OUTBOX_REPLY_RULES: {file}, line {line}: "), message
    assert says in message


def test_the_largest_number_of_rules_is_accepted(file: Path) -> None:
    rules = load(file, "".join(rule(name=f'"r{n}"') for n in range(MAX_RULES)))

    assert f"r{MAX_RULES - 1}" in rules.names


def test_a_file_that_is_too_big_is_refused(file: Path) -> None:
    assert f"{file} is larger than 262,144 bytes" in error_of(file, b"#" * (MAX_FILE_BYTES + 1))
    file.write_bytes(b"#" * MAX_FILE_BYTES)
    ReplyRules.load(str(file))


def test_an_error_message_is_short_for_any_file(file: Path) -> None:
    assert len(error_of(file, rule(**{"k" * 20_000: "1"}))) < 1_000
    assert len(error_of(file, rule(class_='"' + "x" * 20_000 + '"'))) < 1_000
    assert len(error_of(file, rule(code='["' + "x" * 20_000 + '"]'))) < 1_000


def test_a_missing_or_irregular_rules_file_is_refused(tmp_path: Path) -> None:
    missing, pipe = tmp_path / "missing.toml", tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, says in (
        (missing, f"there is no file {missing}"),
        (tmp_path, f"{tmp_path} is not a regular file"),
        (pipe, f"{pipe} is not a regular file"),
        ("a\x00b", "cannot read"),
        ("x" * 5_000, "cannot read"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            ReplyRules.load(str(path))
        assert caught.value.message.startswith("OUTBOX_REPLY_RULES: ")
        assert says in caught.value.message


# The built-in rules and the documented example -----------------------------------------------


def test_the_documented_example_is_valid(file: Path) -> None:
    page = Path(__file__).parents[2].joinpath("docs", "reply-rules.md").read_text(encoding="utf-8")
    example = page.split("```toml\n")[1].split("```")[0]

    rules = load(file, example)

    assert {line.split('"')[1] for line in example.splitlines() if line.startswith("name")} - set(
        rules.names
    ) == {"bad-sequence"}


def test_each_built_in_rule_has_a_source() -> None:
    text = (
        files("outbox_server.shared.smtp").joinpath("reply_rules.toml").read_text(encoding="utf-8")
    )
    blocks = text.split("\n\n")
    for block in blocks:
        if "[[rule]]" in block:
            comment = block.partition("[[rule]]")[0]
            assert comment.startswith("#"), block
