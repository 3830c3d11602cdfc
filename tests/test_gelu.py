"""GELUs are written so that onnxruntime fuses them, and compute what they did."""

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from autocompress.deploy import onnx as deploy_onnx


class Gated(nn.Module):
    """Products with a half that are none of a GELU."""

    def forward(self, x):
        return x * (0.5 * (1 + torch.erf(x.flip(1))))


def fused(net, x, folder):
    """How many GELUs onnxruntime makes of the net's file, after comparing the outputs."""
    file, seen = folder / "net.onnx", folder / "seen.onnx"
    deploy_onnx.write(net.eval(), {"x": x}, False, ["y"], file)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(seen), 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), net(x), atol=1e-6)
    return sum("Gelu" in node.op_type for node in onnx.load(seen).graph.node)


@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 5)], ids=["linear", "conv"])
def test_onnxruntime_fuses_them(shape, tmp_path):
    layers = [nn.Linear(6, 6), nn.Linear(6, 6)] if len(shape) == 2 else [nn.Conv1d(6, 6, 3), nn.Conv1d(6, 2, 3)]
    net = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU())
    assert fused(net, torch.randn(shape), tmp_path) == 2


def test_what_is_none_stays(tmp_path):
    assert fused(Gated(), torch.randn(3, 6), tmp_path) == 0
