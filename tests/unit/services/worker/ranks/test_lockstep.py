"""Ranks in threads of one process: what they compute together is what the whole model computes."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from services.worker.engine.protocol import EngineLimits, FinishReason
from services.worker.engine.transformers_engine import ENGINE, TransformersEngine
from services.worker.model_loading import build_skeleton
from services.worker.ranks.cut_model import JOINED, add_biases_once, cut_skeleton, deals_out_heads
from services.worker.ranks.follower import Follower
from services.worker.ranks.leading_runner import LeadingRunner
from services.worker.weights.module_waits import wait_for_weights
from services.worker.weights.weights_gate import WeightsGate
from stoker.checkpoint.cuts import Cut
from stoker.errors import CheckpointInvalid, KvUnavailable, PeerError
from stoker.models.tensor_parallel import COLWISE, EMBEDDINGS, PACKED, ROWWISE, WHOLE, cut_of, style_of
from stoker.models.weights import assign_weights
from stoker.v1.rank_group_pb2 import RankOrder
from tests.unit.services.worker.tiny_models import CONFIGS, config_json, ids, reference, request, run, served

RANKS = 2
STAGES = 5
"""Embedding, three layers, norm and head."""
WAIT_SECONDS = 60.0
LIMITS = EngineLimits(max_batch=4, max_waiting=8, max_context_tokens=128, max_kv_tokens=4 * 512 + 128)


class Table:
    """Where ranks in threads lay down their parts."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor | None] = [None] * RANKS
        self.barrier = threading.Barrier(RANKS, timeout=WAIT_SECONDS)


class Seat:
    """A `Meets` of one rank at a table."""

    def __init__(self, table: Table, rank: int) -> None:
        self.rank, self.ranks, self._table = rank, RANKS, table

    def _all(self, part: torch.Tensor) -> list[torch.Tensor]:
        self._table.parts[self.rank] = part
        self._table.barrier.wait()
        parts = [each for each in self._table.parts if each is not None]
        self._table.barrier.wait()
        return parts

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """See `Meets`."""
        first, second = self._all(part)
        return first + second

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """See `Meets`."""
        return torch.cat(self._all(part), dim=-1)


class Orders:
    """An `OrderSender` to a rank in a thread of this process."""

    def __init__(self) -> None:
        self.queue: queue.Queue[bytes | None] = queue.Queue()

    def send(self, order: RankOrder) -> None:
        """Tell."""
        self.queue.put(order.SerializeToString())

    def close(self) -> None:
        """Say nothing more."""
        self.queue.put(None)

    def orders(self) -> Iterator[RankOrder]:
        """Yield what was told."""
        while (frame := self.queue.get(timeout=WAIT_SECONDS)) is not None:
            yield RankOrder.FromString(frame)


def cut_out(tensor: torch.Tensor, cut: Cut, rank: int) -> torch.Tensor:
    blocks = tensor.chunk(cut.blocks, cut.dim)
    return torch.cat([block.chunk(RANKS, cut.dim)[rank] for block in blocks], cut.dim).contiguous()


def piece(model, rank: int, seat: Seat):
    """The model that rank `rank` serves, of a whole one."""
    skeleton = build_skeleton(config_json(model))
    plan = dict(skeleton.model.tp_plan)
    tensors = {}
    for name, tensor in model.state_dict().items():
        cut = cut_of(style_of(name, plan), name, tensor.ndim)
        tensors[name] = tensor if cut is None else cut_out(tensor, cut, rank)
    cut_skeleton(skeleton, seat)
    made = assign_weights(skeleton, tensors)
    add_biases_once(made, rank)
    return made


class Gate(WeightsGate):
    """Tells when a pass has come to it."""

    def __init__(self) -> None:
        super().__init__(STAGES, is_interruptible=False)
        self.reached = threading.Event()

    def wait(self, stage: int) -> None:
        """See `WeightsGate`."""
        self.reached.set()
        super().wait(stage)


def wait_at(gate: WeightsGate, model) -> None:
    """Have a rank's layers wait for stages 1 to n, its embedding for 0, and what comes after for the last."""
    tensors = dict(model.named_parameters())
    stages = {}
    for name in tensors:
        layer = re.search(r"layers\.(\d+)\.", name)
        stages[name] = int(layer[1]) + 1 if layer else 0 if "embed" in name else STAGES - 1
    wait_for_weights(model, tensors, stages, gate)


class Group:
    """An engine whose passes a second rank makes, too; `gates` are those that the ranks' weights come by."""

    def __init__(self, model, limits: EngineLimits = LIMITS, gates: Sequence[WeightsGate] = ()) -> None:
        table, self.sender = Table(), Orders()
        pieces = [piece(model, rank, Seat(table, rank)) for rank in range(RANKS)]
        for gate, each in zip(gates, pieces, strict=False):
            wait_at(gate, each)
        self.follower = Follower(
            pieces[1], engine=ENGINE, ranks=RANKS, prefill_chunk_tokens=limits.prefill_chunk_tokens
        )
        self.failed: list[BaseException] = []
        runner = LeadingRunner(pieces[0], None, self.sender, RANKS)
        self.engine = TransformersEngine(pieces[0], limits, runner=runner)
        runner.begin(self.engine.numerics, self.engine.kv_budget)
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self) -> None:
        try:
            self.follower.follow(self.sender.orders())
        except PeerError as error:
            self.failed.append(error)

    def close(self) -> None:
        """End both ranks."""
        self.engine.close()
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()
        assert not self.failed


@pytest.fixture
def group():
    made: list[Group] = []

    def make(model, limits: EngineLimits = LIMITS, gates: Sequence[WeightsGate] = ()) -> Group:
        made.append(Group(model, limits, gates))
        return made[-1]

    yield make
    for each in made:
        each.close()


PROMPTS = {"short": (5, 6, 7), "long": tuple(range(3, 90)), "other": (9, 8, 7, 6, 5, 4)}


def requests():
    return [request(name, prompt) for name, prompt in PROMPTS.items()]


@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "gemma2", "phi3"])
def test_two_ranks_choose_the_tokens_of_the_whole_model(group, name):
    """Norms on heads, soft caps, windows, fused projections, and an embedding that is the head."""
    model = reference(name)
    expected, _ = run(TransformersEngine(served(model), LIMITS), requests())

    tokens, ends = run(group(model).engine, requests())

    assert {key: ids(outs) for key, outs in tokens.items()} == {key: ids(o) for key, o in expected.items()}
    assert {end.reason for end in ends.values()} == {FinishReason.LENGTH}


def test_experts_cut_in_two_choose_the_tokens_of_whole_ones(group):
    """Rows go through a mixture one by one: a short prompt is enough."""
    model, wanted = reference("qwen3_moe"), request("s", (5, 6, 7), max_tokens=4)
    expected, _ = run(TransformersEngine(served(model), LIMITS), [wanted])

    tokens, _ = run(group(model).engine, [wanted])

    assert ids(tokens["s"]) == ids(expected["s"])


def test_a_bias_after_a_sum_is_added_once(group):
    config = CONFIGS["llama"]()
    config.attention_bias = config.mlp_bias = True
    model = type(reference("llama"))(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    expected, _ = run(TransformersEngine(served(model), LIMITS), requests())

    tokens, _ = run(group(model).engine, requests())

    assert {key: ids(outs) for key, outs in tokens.items()} == {key: ids(o) for key, o in expected.items()}


def test_a_session_computes_the_same_bits_beside_others_as_alone(group):
    ranks = group(reference("llama"))
    beside, _ = run(ranks.engine, [request(name, prompt, top_logprobs=2) for name, prompt in PROMPTS.items()])

    alone, _ = run(ranks.engine, [request("long", PROMPTS["long"], top_logprobs=2)])

    assert [(out.token_id, out.logprob) for out in alone["long"]] == [
        (out.token_id, out.logprob) for out in beside["long"]
    ]


def test_stores_of_sessions_that_ended_or_were_cancelled_or_set_back_are_given_back_on_every_rank(group):
    """Two sessions in room for one and a half: the younger is set back and computed again."""
    model = reference("llama")
    tight = EngineLimits(max_batch=3, max_waiting=4, max_context_tokens=256, max_kv_tokens=256)
    wanted = [request(str(n), tuple(range(2 + n, 120 + n)), max_tokens=14) for n in range(2)]
    expected, _ = run(TransformersEngine(served(model), tight), wanted)
    ranks = group(model, tight)

    ranks.engine.submit(request("gone", (1, 2, 3), max_tokens=50))
    ranks.engine.step()
    ranks.engine.cancel("gone")
    tokens, _ = run(ranks.engine, wanted)

    assert ranks.engine.stats().preempted_count > 0
    assert {key: ids(outs) for key, outs in tokens.items() if key != "gone"} == {
        key: ids(outs) for key, outs in expected.items()
    }
    run(ranks.engine, [request("last", (1, 2), max_tokens=1)])
    ranks.close()
    assert ranks.follower.store_count == 1  # the last one's: told with the next pass


def test_ranks_whose_weights_arrive_in_a_pass_choose_the_same_tokens(group):
    """Each rank's stages open at other times; the pass of a session that is cancelled is made to its end."""
    model = reference("llama")
    expected, _ = run(TransformersEngine(served(model), LIMITS), requests())
    gates = [Gate() for _ in range(RANKS)]
    ranks = group(model, LIMITS, gates)
    ranks.engine.submit(request("gone", (1, 2, 3), max_tokens=50))

    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(run, ranks.engine, requests())
        assert all(gate.reached.wait(WAIT_SECONDS) for gate in gates)
        ranks.engine.cancel("gone")
        for stage in range(1, STAGES + 1):
            for gate in reversed(gates) if stage % 2 else gates:
                gate.interrupt()
                gate.open(stage)
        tokens, ends = running.result(timeout=WAIT_SECONDS)

    assert {name: ids(tokens[name]) for name in PROMPTS} == {key: ids(o) for key, o in expected.items()}
    assert ends["gone"].reason is FinishReason.CANCELLED


def test_keys_and_values_of_a_rank_are_not_shipped(group):
    engine = group(reference("llama")).engine
    engine.submit(request("s", (1, 2, 3)))
    engine.step()

    with pytest.raises(KvUnavailable, match="ranks"):
        engine.export_kv("s")
    run(engine)


def test_the_number_of_ranks_belongs_to_the_numerics(group):
    model = reference("llama")
    assert group(model).engine.numerics == TransformersEngine(served(model), LIMITS).numerics + " ranks=2"


def test_a_rank_that_computes_otherwise_does_not_follow():
    model = reference("llama")
    follower = Follower(
        piece(model, 1, Seat(Table(), 1)), engine=ENGINE, ranks=RANKS, prefill_chunk_tokens=256
    )
    begin = RankOrder()
    begin.begin.numerics = "another line"

    with pytest.raises(PeerError, match="another line"):
        follower.follow([begin])


def test_whatever_convert_cuts_is_joined():
    assert COLWISE | ROWWISE | WHOLE | EMBEDDINGS | PACKED <= JOINED


def test_a_plan_that_the_engine_does_not_join_is_refused():
    skeleton = build_skeleton(config_json(reference("llama")))
    skeleton.model.tp_plan = {**skeleton.model.tp_plan, "model.norm": "sequence_parallel"}

    with pytest.raises(CheckpointInvalid, match=r"model\.norm in the style 'sequence_parallel'"):
        cut_skeleton(skeleton, Seat(Table(), 0))


@pytest.mark.parametrize(("name", "dealt"), [("llama", True), ("qwen3_moe", True), ("phi3", False)])
def test_keys_and_values_of_fused_projections_are_kept_whole_on_every_rank(name, dealt):
    assert deals_out_heads(reference(name)) == dealt
