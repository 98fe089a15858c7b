"""Time limits of the phases of a session."""

from __future__ import annotations

from dataclasses import asdict

from outbox_server.shared.settings import load_settings
from outbox_server.shared.smtp.limits import PhaseLimits


def test_the_defaults_are_those_of_rfc_5321() -> None:
    assert asdict(PhaseLimits.from_settings(load_settings())) == {
        "connect": 30,
        "greeting": 300,
        "ehlo": 300,
        "mail": 300,
        "rcpt": 300,
        "data": 120,
        "block": 180,
        "end": 600,
    }


def test_one_setting_replaces_all_phase_limits() -> None:
    settings = load_settings(smtp_timeout="7s", smtp_end_timeout="1h")
    assert PhaseLimits.from_settings(settings) == PhaseLimits.of(7)


def test_each_phase_has_its_setting() -> None:
    names = ("connect", "greeting", "ehlo", "mail", "rcpt", "data", "block", "end")
    values = {f"smtp_{name}_timeout": f"{n + 1}s" for n, name in enumerate(names)}
    found = asdict(PhaseLimits.from_settings(load_settings(**values)))
    assert found == {name: n + 1 for n, name in enumerate(names)}
