"""Builders: values with defaults, so that a test names only what it is about."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from services.gateway.routing.routes import ModelRoute, Replica
from services.gateway.sessions.session import Session
from services.gateway.text.model_text import ModelText
from stoker.ids import ModelName, ReplicaId, SessionId
from stoker.v1 import controller_pb2, model_pb2, session_pb2
from tests.unit.services.gateway.text.tokenizers_for_tests import EOS, byte_level

TOKENIZER = byte_level(merges=False)
END = TOKENIZER.token_to_id(EOS)
TEXT = ModelText(
    {
        "tokenizer.json": TOKENIZER.to_str().encode(),
        "tokenizer_config.json": json.dumps(
            {"eos_token": EOS, "chat_template": "{{ messages[0].content }}"}
        ).encode(),
    }
)


def ids_of(text: str) -> list[int]:
    """Return the text's tokens, one per byte."""
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def replica(replica_id: str = "rep-1", **changed: Any) -> Replica:
    """Return a ready replica."""
    fields: dict[str, Any] = {
        "replica_id": ReplicaId(replica_id),
        "node_id": "node-1",
        "agent_address": "127.0.0.1:7071",
        "max_context_tokens": 100,
        "max_batch": 4,
    }
    return Replica(**(fields | changed))


def route(name: str = "tiny", **changed: Any) -> ModelRoute:
    """Return a route with one ready replica."""
    fields: dict[str, Any] = {
        "name": ModelName(name),
        "created_unix_seconds": 1.0,
        "checkpoint_uri": f"/models/{name}",
        "revision": "r1",
        "context_tokens": 100,
        "vocabulary_tokens": 0,
        "max_queue": 2,
        "replicas": (replica(),),
        "store_addresses": (),
    }
    return ModelRoute(**(fields | changed))


def route_message(
    name: str, *, replica_ids: Sequence[str] = (), deleted: bool = False, adapters: Sequence[str] = ()
) -> controller_pb2.Route:
    """Return a route as the controller sends it."""
    spec = model_pb2.ModelSpec(
        name=name,
        checkpoint_uri=f"/models/{name}",
        adapters=[model_pb2.AdapterSpec(name=adapter, revision="a1") for adapter in adapters],
    )
    return controller_pb2.Route(
        model=model_pb2.Model(spec=spec),
        replicas=[controller_pb2.RouteReplica(replica_id=replica_id) for replica_id in replica_ids],
        deleted=deleted,
    )


def session(*, stop: Sequence[str] = (), keep_seconds: float = 0.0, **sampling: Any) -> Session:
    """Return a fresh session of a byte-level model."""
    fields = {"max_tokens": 100, "stop_token_ids": [END], "seed": 7} | sampling
    return Session(
        session_id=SessionId("ses-1"),
        prompt_token_ids=[1, 2],
        sampling=session_pb2.Sampling(**fields),
        text=TEXT,
        stop=stop,
        keep_seconds=keep_seconds,
    )


def event(position: int, token_ids: Sequence[int], *, finish: int = 0, epoch: int = 0) -> Any:
    """Return a worker's event; the log probability of token t is -t."""
    return session_pb2.GenerateEvent(
        epoch=epoch,
        position=position,
        tokens=[
            session_pb2.Token(
                id=token_id, logprob=-token_id, top_logprobs=[session_pb2.TopLogprob(id=token_id, logprob=-1)]
            )
            for token_id in token_ids
        ],
        finish_reason=session_pb2.FinishReason.Name(finish),
    )
