"""Named tensors, as a client computes with them, and their way to Flower's records."""

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from flower_ext.core.held import reply_record

Tensors = Mapping[str, Tensor]


def tensor_record(tensors: Tensors) -> ArrayRecord:
    """Serialise named tensors, keeping their order."""
    return ArrayRecord({**tensors})


def reply_tensors(tensors: Tensors) -> ArrayRecord:
    """Serialise what a client sends, see :func:`flower_ext.core.held.reply_record`."""
    return reply_record({name: x.detach().cpu().numpy() for name, x in tensors.items()})


def read_tensors(
    record: ArrayRecord, device: torch.device | None = None
) -> dict[str, Tensor]:
    """Read a record's arrays as tensors of their own, on a device."""
    return {name: x.to(device) for name, x in record.to_torch_state_dict().items()}
