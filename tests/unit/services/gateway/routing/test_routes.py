"""Routes: what the table knows, and which replica gets a session."""

from __future__ import annotations

import pytest

from services.gateway.routing.routes import SHUN_SECONDS, RouteTable, choose_replica
from stoker.errors import ModelNotFound, PeerError
from stoker.ids import ReplicaId
from stoker.v1 import controller_pb2
from tests.unit.services.gateway.builders import replica, route, route_message


def table(*names: str) -> RouteTable:
    filled = RouteTable()
    filled.apply(
        controller_pb2.RoutesUpdate(
            snapshot=True, routes=[route_message(name, replica_ids=["r1"]) for name in names]
        )
    )
    return filled


def test_the_replica_with_most_room_is_chosen() -> None:
    busy, free = replica("busy", max_batch=8), replica("free", max_batch=4)

    assert choose_replica([busy, free], {ReplicaId("busy"): 6, ReplicaId("free"): 2}) == free


def test_the_first_of_equals_is_chosen() -> None:
    assert choose_replica([replica("a"), replica("b")], {}) == replica("a")


def test_replicas_that_failed_are_not_chosen() -> None:
    assert choose_replica([replica("a"), replica("b")], {}, excluded=["a"]) == replica("b")
    assert choose_replica([replica("a")], {}, excluded=["a"]) is None


def test_near_names_are_suggested() -> None:
    with pytest.raises(ModelNotFound, match=r"Did you mean 'smollm2'"):
        table("smollm2", "qwen").find("smolm2")


def test_no_name_is_suggested_where_none_is_near() -> None:
    with pytest.raises(ModelNotFound) as caught:
        table("smollm2").find("zzz")
    assert "Did you mean" not in caught.value.message


def test_before_the_first_word_of_a_controller_nothing_is_denied() -> None:
    with pytest.raises(PeerError, match="not heard from a controller"):
        RouteTable().find("any")


def test_changes_leave_the_other_routes_alone_and_a_snapshot_replaces_all() -> None:
    routes = table("a", "b")
    routes.apply(controller_pb2.RoutesUpdate(routes=[route_message("b", deleted=True), route_message("c")]))
    assert [known.name for known in routes.models()] == ["a", "c"]

    routes.apply(controller_pb2.RoutesUpdate(snapshot=True, routes=[route_message("z")]))
    assert [known.name for known in routes.models()] == ["z"]


def test_a_heartbeat_changes_nothing() -> None:
    routes = table("a")
    routes.apply(controller_pb2.RoutesUpdate(snapshot=True, heartbeat=True))

    assert "a" in routes


def test_a_failed_replica_is_passed_over_for_a_while() -> None:
    routes = table("a")
    routes.shun(ReplicaId("r1"), now_seconds=10)

    assert routes.shunned(now_seconds=10 + SHUN_SECONDS / 2) == {"r1"}
    assert routes.shunned(now_seconds=10 + SHUN_SECONDS) == frozenset()


def test_a_replica_the_controller_names_anew_is_trusted_again() -> None:
    routes = table("a")
    routes.shun(ReplicaId("r1"), now_seconds=10)
    routes.apply(controller_pb2.RoutesUpdate(routes=[route_message("a", replica_ids=["r1"])]))

    assert routes.shunned(now_seconds=10) == frozenset()


def test_the_context_is_the_smaller_of_what_is_known() -> None:
    message = route_message("a")
    message.model.spec.max_context_tokens = 50
    message.model.checkpoint.context_tokens = 80
    routes = RouteTable()
    routes.apply(controller_pb2.RoutesUpdate(snapshot=True, routes=[message]))

    assert routes.find("a").context_tokens == 50


def test_capacity_is_the_sum_of_the_batches() -> None:
    assert route(replicas=(replica("a", max_batch=4), replica("b", max_batch=0))).batch_capacity == 5


def test_a_snapshot_in_several_messages_counts_once_it_is_whole() -> None:
    routes = RouteTable()
    routes.apply(controller_pb2.RoutesUpdate(snapshot=True, routes=[route_message("old")]))

    routes.apply(controller_pb2.RoutesUpdate(snapshot=True, routes=[route_message("a")], more=True))
    meanwhile = [route.name for route in routes.models()]
    routes.apply(controller_pb2.RoutesUpdate(routes=[route_message("b")]))

    assert meanwhile == ["old"]
    assert [route.name for route in routes.models()] == ["a", "b"]


def adapted() -> RouteTable:
    filled = RouteTable()
    message = route_message("llama", replica_ids=["r1"], adapters=["poet", "coder"])
    filled.apply(controller_pb2.RoutesUpdate(snapshot=True, routes=[message]))
    return filled


def test_a_model_is_found_with_each_of_its_adapters() -> None:
    routes = adapted()

    assert routes.find("llama").names == ("llama", "llama:coder", "llama:poet")
    assert routes.find("llama:poet").adapters["poet"].revision == "a1"
    assert "llama:coder" in routes


@pytest.mark.parametrize("name", ["llama:poem", "lama:poet", "llama:", "llama:poet:x"])
def test_an_unknown_adapter_is_not_found_and_near_names_are_suggested(name) -> None:
    with pytest.raises(ModelNotFound, match=r"Did you mean .*'llama:poet'"):
        adapted().find(name)
    assert name not in adapted()
