from __future__ import annotations

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from outbox_server.services.dispatcher.endpoint_meter import EndpointMeter, EndpointName
from outbox_server.shared.smtp.endpoint import Endpoint
from outbox_server.shared.smtp.latencies import BUCKETS, bucket_of, quantile
from outbox_server.shared.states import ReplyClass, SmtpSecurity


@given(st.lists(st.floats(0.001, 600), min_size=1), st.sampled_from([0.5, 0.99]))
def test_a_quantile_is_at_most_19_percent_too_long(seconds: list[float], part: float) -> None:
    counts = [0] * BUCKETS
    for each in seconds:
        counts[bucket_of(each)] += 1
    exact = sorted(seconds)[max(-(-len(seconds) * part // 1).__int__() - 1, 0)]
    found = quantile(counts, part)
    assert found is not None
    assert exact * 0.999 <= found.total_seconds() <= exact * 1.2


def test_a_quantile_of_nothing_is_none_and_extremes_have_a_bucket() -> None:
    assert quantile([0] * BUCKETS, 0.5) is None
    assert (bucket_of(0), bucket_of(1e9)) == (0, BUCKETS - 1)


def test_attempts_are_counted_for_five_to_ten_minutes() -> None:
    now = 0.0
    meter = EndpointMeter(lambda: now)
    endpoint = Endpoint("mail.example", 25, SmtpSecurity.NONE, chosen_by="ann", circuit="c")
    name = EndpointName("ann", "mail.example", 25)

    def sent() -> int:
        found = meter.figures().get(name)
        return 0 if found is None else found.replies[ReplyClass.SENT]

    meter.count(endpoint, ReplyClass.SENT, 0.1)
    now = 299.0
    meter.count(endpoint, ReplyClass.SENT, 0.1)
    now = 599.0
    assert sent() == 2
    meter.count(endpoint, ReplyClass.SENT, 0.1)
    now = 600.0
    assert sent() == 1
    now = 5_000.0
    assert sent() == 0
    # No number of endpoints makes it grow without end.
    for port in range(1, 3_000):
        user = f"u{port % 100}"
        meter.count(Endpoint("mail.example", port, SmtpSecurity.NONE, chosen_by=user), None, 0.1)
    assert len(meter.figures()) == 1_000
    assert quantile([0, 3], 0.5) == timedelta(milliseconds=2 ** (1 / 4))


def test_one_user_leaves_room_for_the_endpoints_of_others() -> None:
    meter = EndpointMeter()
    for number in range(2_000):
        host = f"h{number}.attacker.example"
        meter.count(Endpoint(host, 25, SmtpSecurity.NONE, chosen_by="a"), None, 0.1)
    meter.count(Endpoint("mx.victim.example", 25, SmtpSecurity.NONE, chosen_by="b"), None, 0.1)
    meter.count(Endpoint("relay.test", 25, SmtpSecurity.NONE, operators=True), None, 0.1)
    figures = meter.figures()
    assert EndpointName("b", "mx.victim.example", 25) in figures
    assert EndpointName("", "relay.test", 25) in figures
    assert len(figures) <= 1_000
