"""The circuits of senders, as the head loader writes them to Redis."""

from __future__ import annotations

from typing import Any

from tests.world import World


async def test_two_users_who_name_the_same_account_share_no_circuit(world: World) -> None:
    account: dict[str, Any] = {"smtp_host": "mail.test", "smtp_port": 587, "smtp_username": "anna"}
    senders = [await world.sender(**account) for _ in range(3)]
    await world.sql("UPDATE senders SET user_id = 'eve' WHERE id = %s", senders[2])
    for sender in senders:
        await world.schedule(sender)

    prefix = world.queues[0].keys.ready.replace("ready", "sender:")
    own, same, other = [await world.redis.hget(f"{prefix}{each}", "endpoint") for each in senders]
    assert own == same != other
