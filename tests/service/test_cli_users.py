"""`outbox users` against a scheduler."""

from __future__ import annotations

import json
from typing import Any

from tests.commands import outbox
from tests.scheduler_stack import Scheduler, running_scheduler


async def users(scheduler: Scheduler, *words: str) -> tuple[int, Any]:
    """Run a command; return its exit code and its JSON, or its error."""
    done = await outbox(scheduler, "users", *words, "-o", "json")
    return done.exit_code, json.loads(done.stdout) if done.stdout else done.stderr


async def test_quotas_and_domains_are_set_shown_listed_and_reset(
    database_url: str, redis_url: str
) -> None:
    async with running_scheduler(database_url, redis_url) as scheduler:
        await scheduler.sender()
        options = ("--senders", "3", "--waiting-jobs", "500", "--domain", "Example.com")
        code, made = await users(scheduler, "set", "ann", *options, "--domain", "*.example.com")
        assert code == 0
        assert made["quotas"] == {"senders": "3", "waiting_jobs": "500"}
        assert made["sender_domains"] == ["example.com", "*.example.com"]
        code, changed = await users(scheduler, "set", "ann", "--senders", "default", "--calls", "0")
        assert changed["quotas"] == {"waiting_jobs": "500", "calls": "0"}
        code, shown = await users(scheduler, "show", "ann")
        assert (code, shown["usage"]["sender_count"]) == (0, "1")
        assert shown["effective_quotas"]["senders"] == "10000"
        assert len(shown["sender_domains"]) == 2
        code, shown = await users(scheduler, "set", "ann", "--no-domains")
        assert (code, shown.get("sender_domains", [])) == (0, [])
        code, made = await users(scheduler, "set", "ann", "--hourly-limit", "9", "--min-gap", "2s")
        assert (code, made["limits"]) == (0, {"hourly_limit": "9", "min_gap": "2s"})
        unlimited = ("--hourly-limit", "0", "--min-gap", "default")
        code, made = await users(scheduler, "set", "ann", *unlimited)
        assert (code, made["limits"]) == (0, {"hourly_limit": "0"})
        code, listed = await users(scheduler, "list", "--all")
        assert (code, [each["user_id"] for each in listed["users"]]) == (0, ["ann"])


async def test_wrong_options_are_usage_errors(database_url: str, redis_url: str) -> None:
    async with running_scheduler(database_url, redis_url) as scheduler:
        code, said = await users(scheduler, "set", "ann")
        assert (code, "name at least one quota" in said) == (2, True)
        code, said = await users(scheduler, "set", "ann", "--calls", "-1")
        assert (code, "must be 0 to" in said) == (2, True)
        code, said = await users(scheduler, "set", "ann", "--hourly-limit", "1000001")
        assert (code, "must be 0 to 1000000, or default" in said) == (2, True)
        code, said = await users(scheduler, "set", "ann", "--min-gap", "soon")
        assert (code, "is not a duration" in said) == (2, True)
        code, said = await users(scheduler, "set", "ann", "--no-domains", "--domain", "a.org")
        assert (code, "cannot be combined" in said) == (2, True)
        code, said = await users(scheduler, "set", "ann", "--domain", "nonsense")
        assert (code, "is not a domain" in said) == (1, True)
