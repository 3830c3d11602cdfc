"""A state and its file: what is behind codes in bfloat16, all else bit for bit."""

import json

import pytest
import torch
from safetensors.torch import save

from autocompress.compress.lineage import State, pack, unpack
from autocompress.errors import RecordError
from autocompress.plan import LayerPlan, Plan

PLAN = Plan({"a": LayerPlan(bits=4)})


def test_weights_behind_codes_are_short_and_the_rest_is_exact():
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a.weight": torch.randn(5, 4, generator=generator), "a.weight#unit": torch.tensor(0.7, dtype=torch.float64),
        "a.weight#step": torch.tensor(0.123456789), "norm.running_mean": torch.randn(5, generator=generator),
        "count": torch.tensor(7),
    }  # fmt: skip
    found = unpack(pack(State(PLAN, tensors)))
    assert found.plan == PLAN
    assert found.tensors.keys() == tensors.keys()
    for key, tensor in tensors.items():
        wanted = tensor.bfloat16() if key == "a.weight" else tensor
        assert torch.equal(found.tensors[key], wanted)
        assert found.tensors[key].dtype == wanted.dtype


@pytest.mark.parametrize("plan", [{"layers": []}, {"layers": {"a": 3}}, [], 7, {"layers": {"a": {"bite": 3}}}])
def test_any_damage_is_told(plan):
    with pytest.raises(RecordError, match="state of trial 3 is damaged"):
        unpack(save({"a": torch.zeros(2)}, {"plan": json.dumps(plan)}), "state of trial 3")
