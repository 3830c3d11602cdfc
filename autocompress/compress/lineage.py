"""The state that a trial leaves behind and another one goes on from: a value, and its file.

The file is safetensors: float weights behind codes in bfloat16 (their last bits are far below a grid's step),
all else as it is, the plan as JSON in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autocompress.errors import RecordError
from autocompress.plan import Plan


@dataclass(frozen=True)
class State:
    """What finetuning goes on from: the float tensors behind a trial's codes, and its plan.

    `tensors` holds, by state key of the compressed model, the full float weights (pruned ones as
    they were when they were pruned), all other parameters and buffers, and for each code
    "KEY#unit" (the standard deviation that thresholds count in, that of the weights at first) and
    "KEY#table" or "KEY#step" (and "KEY#low" of a grid that is not symmetric); "KEY#mask" where a saliency other than
    magnitude chose the weights that stay.
    """

    plan: Plan
    tensors: Mapping[str, Tensor]


def pack(state: State) -> bytes:
    """The state as a safetensors file."""
    from safetensors.torch import save

    def stored(key: str, tensor: Tensor) -> Tensor:
        short = f"{key}#unit" in state.tensors and tensor.dtype == torch.float32
        return (tensor.bfloat16() if short else tensor).detach().cpu().contiguous().clone()

    tensors = {key: stored(key, tensor) for key, tensor in state.tensors.items()}
    return bytes(save(tensors, {"plan": json.dumps(state.plan.to_json())}))


def unpack(data: bytes, source: str = "state") -> State:
    """The state in a file's bytes, on the CPU; short weights stay short. Raises RecordError for anything else."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        return State(Plan.from_json(json.loads(metadata["plan"])), tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{source} is damaged: {' '.join(str(error).split())}") from error
