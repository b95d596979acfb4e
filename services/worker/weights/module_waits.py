"""Makes a model's modules wait for their own weights, until a pass finds that all have come.

What a module waits for follows from the tensors it holds, not from its name: a decoder layer for all that is
in it, any other module for its own parameters. So an architecture that uses something early which others use
late is still right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from services.worker.model_loading import decoder_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch
    from torch import nn

    from services.worker.weights.weights_gate import WeightsGate


def wait_for_weights(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    stage_of: Mapping[str, int],
    gate: WeightsGate,
    join: Callable[[int], None] = lambda _stage: None,
) -> int:
    """Make the model's forward passes wait at the gate; the waits remove themselves once it is open.

    Args:
        model: Its parameters are the tensors, not copies of them.
        tensors: By name; names may share one.
        stage_of: Stage of each stored tensor. A parameter that is none of them waits for everything.
        gate: Opens stage by stage.
        join: Called in the pass's thread once a stage is open: makes the device wait for what is still being
            copied there.

    Returns:
        How many stages a pass through the whole model waits for.
    """
    last = max(stage_of.values(), default=-1)
    stages: dict[int, int] = {}
    for name, stage in stage_of.items():
        address = tensors[name].data_ptr()
        if address:  # an empty tensor has none
            stages[address] = max(stage, stages.get(address, 0))
    handles: list[torch.utils.hooks.RemovableHandle] = []
    deepest = -1

    def before(stage: int) -> Any:
        def wait(_module: nn.Module, _arguments: Any) -> None:
            if gate.is_open:
                join(last)
                for handle in handles:
                    handle.remove()
                handles.clear()
            else:
                gate.wait(stage)
                join(stage)

        return wait

    for module, own in _waiting_modules(model):
        needed = [stages.get(parameter.data_ptr(), last) for parameter in own.parameters if parameter.numel()]
        needed += [stages[buffer.data_ptr()] for buffer in own.buffers if buffer.data_ptr() in stages]
        if needed:
            handles.append(module.register_forward_pre_hook(before(max(needed))))
            deepest = max(deepest, *needed)
    return deepest + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """What a module waits for; of its buffers only those that the checkpoint holds: others are computed."""

    parameters: list[nn.Parameter]
    buffers: list[torch.Tensor]


def _waiting_modules(model: nn.Module) -> Iterator[tuple[nn.Module, _Own]]:
    """Yield each decoder layer with all its weights, and every other module with those it holds itself."""
    layers = list(decoder_layers(model))
    inside = {id(module) for layer in layers for module in layer.modules()}
    for layer in layers:
        yield layer, _own(layer, recurse=True)
    for module in model.modules():
        if id(module) not in inside:
            yield module, _own(module, recurse=False)


def _own(module: nn.Module, *, recurse: bool) -> _Own:
    return _Own(parameters=list(module.parameters(recurse)), buffers=list(module.buffers(recurse)))
