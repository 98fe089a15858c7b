"""The options that client commands share: where they may stand, and which commands have them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from outbox_client import AsyncClient, Client

from outbox_server import cli
from outbox_server.cli.client_options import CONNECTION_PANEL, place_options
from outbox_server.cli.failures import asks_for_json
from tests.command_tree import ALL, NOT_CLIENTS, command, flags
from tests.contract_methods import contract_methods
from tests.for_each import for_each

CONNECTION = {"--server", "--api-key-file", "--tls-ca", "--tls-cert", "--tls-key", "--timeout"}


def code_of(found: Any) -> Any:
    """Return the code of the function that a command runs."""
    functions = [found.callback]
    while functions:
        function = functions.pop()
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is None and (function.__closure__ or ()):
            inner = [cell.cell_contents for cell in function.__closure__]
            functions += [each for each in inner if hasattr(each, "__code__")]
        elif wrapped is not None:
            functions.append(wrapped)
        else:
            yield function.__code__


@for_each(ALL)
def test_a_command_that_connects_has_all_options_of_a_client(case: tuple[str, Any]) -> None:
    path, found = case
    connects = "--server" in flags(found) and path not in NOT_CLIENTS
    assert not connects or flags(found) >= CONNECTION
    if connects:
        server = next(each for each in found.params if "--server" in each.opts)
        assert server.rich_help_panel == CONNECTION_PANEL
        assert {"-o", "--output"} <= flags(found)


# What these do, commands do by methods of the client, or it is only for callers over REST.
INDIRECT = {
    *("ScheduleBatch", "UploadBatch", "UploadBatchFile", "WatchBatch", "ImportSuppressionsFile"),
}
CHANGES = {
    method.input_type.name: {
        name
        for name in ("request_id", "identity", "reason", "etag")
        if name in method.input_type.fields_by_name
    }
    for method in contract_methods()
    if "identity" in method.input_type.fields_by_name and method.name not in INDIRECT
}


@for_each(ALL)
def test_a_command_that_changes_something_passes_on_who_and_why(case: tuple[str, Any]) -> None:
    _, found = case
    if "--server" not in flags(found):
        return
    names = {name for code in code_of(found) for name in code.co_names}
    fields = {field for name in names & CHANGES.keys() for field in CHANGES[name]}
    known = flags(found)
    assert {f"--{name.replace('_', '-')}" for name in fields - {"reason"}} <= known
    assert "reason" not in fields or "--change-reason" in known


def test_every_changing_request_is_made_by_a_command() -> None:
    names = {
        name
        for path, found in ALL
        if "--server" in flags(found)
        for code in code_of(found)
        for name in code.co_names
    }
    # The test before this one finds a command by the requests that its code names.
    assert CHANGES.keys() - names == set()


def test_the_client_reads_all_pages_of_every_list() -> None:
    lists = {
        re.sub("(?<!^)([A-Z])", r"_\1", method.name).lower()
        for method in contract_methods()
        if method.name.startswith("List") and "page_token" in method.input_type.fields_by_name
    }
    for client in (Client, AsyncClient):
        assert {name for name in lists if not hasattr(client, name)} == set()


def test_every_method_of_the_contract_has_a_command() -> None:
    code = "".join(
        path.read_text(encoding="utf-8") for path in Path(cli.__file__).parent.glob("*.py")
    )
    names = {method.name for method in contract_methods()} - INDIRECT
    assert {name for name in names if f".{name}" not in code} == set()


@pytest.mark.parametrize(
    ("before", "words", "placed"),
    [
        ({"user": "u"}, ["list"], ["list", "--user", "u"]),
        ({}, ["--user", "u", "list"], ["list", "--user", "u"]),
        (
            {},
            ["--user=u", "-ojson", "list", "--all"],
            ["list", "--user", "u", "--output", "json", "--all"],
        ),
        ({"user": "u"}, ["list", "--user", "v"], ["list", "--user", "u", "--user", "v"]),
        ({"user": "u"}, ["--user", "v", "list"], ["list", "--user", "v"]),
        ({"tls_ca": "ca.pem"}, ["get", "7"], ["get", "--tls-ca", "ca.pem", "7"]),
        # These end in the group's own answer.
        ({"user": "u"}, [], []),
        ({"user": "u"}, ["lisst"], ["lisst"]),
        ({}, ["--bogus", "x", "list"], ["--bogus", "x", "list"]),
    ],
)
def test_options_before_the_command_are_moved_behind_it(
    before: dict[str, str | None], words: list[str], placed: list[str]
) -> None:
    assert place_options(command("senders"), before, words) == placed


def test_options_between_a_group_and_its_command_go_to_the_command() -> None:
    held = command("held")
    assert place_options(held, {"output": "json"}, []) == ["--output", "json"]
    placed = place_options(held, {"output": "json"}, ["--user", "u", "release", "--all"])
    assert placed == ["release", "--output", "json", "--user", "u", "--all"]


def test_an_option_that_the_command_does_not_have_is_an_error() -> None:
    with pytest.raises(typer.BadParameter, match="`migrate` has no such option"):
        place_options(command("migrate"), {"user": "u"}, [])
    with pytest.raises(typer.BadParameter, match="requires a value"):
        place_options(command("senders"), {}, ["--user"])
    # How to connect is no contradiction to a command that does not connect.
    assert place_options(command("migrate"), {"tls_ca": "x", "timeout": "5s"}, []) == []


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("-o json senders list", True),
        ("senders list -ojson", True),
        ("senders list --output json", True),
        ("senders list --output=json", True),
        ("senders list -o json -o table", False),
        ("senders list", False),
        ("schedule -- -o json", False),
    ],
)
def test_json_errors_follow_the_output_option(words: str, wanted: bool) -> None:
    assert asks_for_json(words.split()) is wanted
