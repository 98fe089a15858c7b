from __future__ import annotations

import pytest
from google.protobuf.descriptor_pb2 import MethodOptions

from outbox_server.shared.callers import (
    Caller,
    CallerKind,
    check_may_call,
    current_caller,
    effective_user,
    is_loopback,
    require_user,
)
from outbox_server.shared.errors import InvalidInput, PermissionDenied, Unauthenticated
from outbox_server.shared.rpc.reads import READS, check_may_change
from tests.contract_methods import contract_methods

ANN = Caller(user_id="ann", kind=CallerKind.USER)
BACKEND = Caller(user_id=None, kind=CallerKind.SERVICE)
LOCAL = Caller(user_id=None, kind=CallerKind.LOCAL)


def test_a_user_acts_for_itself_with_or_without_its_user_id() -> None:
    assert effective_user(ANN, "") == "ann"
    assert effective_user(ANN, "ann") == "ann"


def test_a_user_cannot_act_for_another() -> None:
    with pytest.raises(PermissionDenied) as caught:
        effective_user(ANN, "bob")
    assert caught.value.reason == "USER_MISMATCH"


@pytest.mark.parametrize("caller", [BACKEND, LOCAL, Caller(None, CallerKind.OPERATOR)])
def test_services_and_operators_act_for_the_user_that_they_name(caller: Caller) -> None:
    assert effective_user(caller, "bob") == "bob"
    assert effective_user(caller, "") is None
    with pytest.raises(InvalidInput) as caught:
        require_user(caller, "")
    assert caught.value.reason == "USER_ID_REQUIRED"


def test_a_key_that_only_reads_may_call_the_methods_that_read_and_no_others() -> None:
    reader = Caller("ann", CallerKind.USER, read_only=True)
    verbs = (
        "Get",
        "List",
        "Watch",
        "Query",
        "Audit",
        "Explain",
        "Export",
        "Forecast",
        "Render",
        "Preview",
    )
    checked = 0
    for method in contract_methods():
        path = f"/{method.containing_service.full_name}/{method.name}"
        check_may_change(ANN, path)
        # The rule of the contract and the names of its methods agree.
        if method.name.startswith(verbs):
            check_may_change(reader, path)
        else:
            with pytest.raises(PermissionDenied) as caught:
                check_may_change(reader, path)
            assert caught.value.reason == "READ_ONLY_KEY"
        safe = method.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS
        assert not safe or path in READS, path
        checked += 1
    assert checked > 50
    with pytest.raises(PermissionDenied):
        check_may_change(reader, "/outbox.v1.SenderService/NotKnownYet")


def test_there_is_no_caller_outside_of_a_call() -> None:
    with pytest.raises(Unauthenticated):
        current_caller()


@pytest.mark.parametrize(
    "listen", ["127.0.0.1:1", "127.8.8.8:1", "[::1]:1", "localhost:1", "unix:/run/outbox"]
)
def test_loopback_addresses_are_reachable_only_from_this_machine(listen: str) -> None:
    assert is_loopback(listen)


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "mail.example:1", "localhost.example:1", ":1"]
)
def test_other_addresses_are_reachable_from_other_machines(listen: str) -> None:
    assert not is_loopback(listen)


@pytest.mark.parametrize("caller", [ANN, BACKEND])
def test_operator_services_require_an_operator_key(caller: Caller) -> None:
    with pytest.raises(PermissionDenied) as caught:
        check_may_call(caller, "/outbox.v1.DispatcherService/DrainDispatcher")
    assert caught.value.reason == "OPERATOR_REQUIRED"
    check_may_call(caller, "/outbox.v1.BatchService/GetBatch")
    check_may_call(
        Caller(None, CallerKind.OPERATOR), "/outbox.v1.DispatcherService/DrainDispatcher"
    )
    check_may_call(LOCAL, "/outbox.v1.DispatcherService/DrainDispatcher")
