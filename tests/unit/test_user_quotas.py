"""The defaults of the quotas of users."""

from __future__ import annotations

import pytest

from outbox_server.shared.settings import load_settings
from outbox_server.shared.user_quotas import UserQuotas


def unproven_endpoints(**options: int) -> int:
    return UserQuotas.from_settings(load_settings(**options)).unproven_endpoints


@pytest.mark.parametrize(("concurrency", "most"), [(1, 2), (5, 2), (8, 2), (20, 5)])
def test_by_default_a_quarter_of_the_slots_may_be_at_endpoints_that_have_not_replied(
    concurrency: int, most: int
) -> None:
    assert unproven_endpoints(dispatcher_concurrency=concurrency) == most


def test_the_setting_replaces_the_quarter() -> None:
    assert unproven_endpoints(user_unproven_endpoints=7) == 7
