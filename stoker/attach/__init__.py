"""Attach to checkpoints that the store daemon of this host holds in memory: zero copy, shared by all.

`attach` returns an `Attachment` whose buffers are the store's memory; `stoker.attach.tensors` makes torch
tensors of it. Only `tensors` needs torch.
"""

from stoker.attach.attachment import Attachment, AttachTimings, Loaded
from stoker.attach.client import attach
from stoker.attach.columns import Tensor

__all__ = ["AttachTimings", "Attachment", "Loaded", "Tensor", "attach"]
