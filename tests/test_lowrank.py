"""Factors against NumPy's SVD, and two layers against one with the product of their weights."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autocompress.compress import lowrank
from autocompress.plan import LayerPlan, LayerSpec

F64 = {"dtype": torch.float64}


def weight(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def as_numpy_matrix(values, scheme):
    """The matrix of the scheme, entry by entry."""
    if scheme == "channel":
        return values.reshape(len(values), -1)
    out, inner, height, width = values.shape
    matrix = np.empty((inner * height, out * width))
    for o, i, h, w in np.ndindex(values.shape):
        matrix[i * height + h, o * width + w] = values[o, i, h, w]
    return matrix


CASES = [((7, 5), "channel"), ((6, 4, 3), "channel"), ((6, 4, 3, 2), "channel"), ((5, 3, 2, 3, 2), "channel"),
         ((6, 4, 3, 2), "spatial"), ((3, 5, 1, 4), "spatial"), ((2, 3, 5, 5), "spatial")]  # fmt: skip


@pytest.mark.parametrize(("shape", "scheme"), CASES)
def test_the_error_of_each_rank_is_the_tail_of_the_singular_values(shape, scheme):
    values = weight(*shape)
    matrix = as_numpy_matrix(values.numpy(), scheme)
    singular = np.linalg.svd(matrix, compute_uv=False)
    parts = lowrank.svd(values, scheme)
    assert np.allclose(parts[1], singular)
    for rank in range(1, len(singular) + 1):
        first, second = lowrank.factor_weights(shape, parts, rank, scheme)
        whole = lowrank.product(first, second, shape, scheme)
        assert whole.shape == shape
        error = ((whole - values) ** 2).sum().item()
        assert error == pytest.approx((singular[rank:] ** 2).sum(), abs=1e-12)  # Eckart & Young
        assert np.linalg.matrix_rank(as_numpy_matrix(whole.numpy(), scheme)) == rank
    assert torch.allclose(whole, values, atol=1e-12)


@pytest.mark.parametrize(("shape", "scheme"), CASES)
def test_factors_share_the_singular_values_evenly(shape, scheme):
    spec = LayerSpec("x", "conv2d" if len(shape) == 4 else "linear", shape, 1)
    parts = lowrank.svd(weight(*shape), scheme)
    assert lowrank.as_matrix(weight(*shape), scheme).shape == spec.matrix(scheme)
    first, second = lowrank.factor_weights(shape, parts, 2, scheme)
    assert first.shape[0] == second.shape[1] == 2
    assert first.numel() + second.numel() == 2 * sum(spec.matrix(scheme))
    assert first.norm().item() == pytest.approx(second.norm().item())


def pair_of(layer, rank, scheme="channel"):
    """The layer's two factors with weights from its SVD, and the layer with their product."""
    spec_shape = tuple(layer.weight.shape)
    first, second = lowrank.factor_weights(spec_shape, lowrank.svd(layer.weight, scheme), rank, scheme)
    pair = lowrank.factorised(layer, LayerPlan(rank=rank, scheme=scheme))
    with torch.no_grad():
        pair[0].weight.copy_(first)
        pair[1].weight.copy_(second)
    return pair, lowrank.product(first, second, spec_shape, scheme)


def conv_settings():
    yield nn.Linear(7, 5, **F64), (3, 7), "channel"
    yield nn.Linear(7, 5, bias=False, **F64), (2, 4, 7), "channel"
    yield nn.Conv1d(3, 4, 5, stride=2, padding=3, dilation=2, padding_mode="circular", **F64), (2, 3, 17), "channel"
    yield (
        nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 2), dilation=(1, 1, 2), **F64),
        (2, 2, 4, 7, 9),
        "channel",
    )
    for scheme in ("channel", "spatial"):
        yield nn.Conv2d(3, 4, 3, **F64), (2, 3, 9, 8), scheme
        yield nn.Conv2d(3, 4, (3, 5), stride=(2, 3), padding=(1, 2), bias=False, **F64), (2, 3, 11, 12), scheme
        yield nn.Conv2d(3, 4, (2, 3), dilation=(3, 2), padding=(2, 1), **F64), (2, 3, 11, 12), scheme
        yield nn.Conv2d(3, 4, (3, 4), padding="same", dilation=(2, 1), **F64), (2, 3, 7, 8), scheme
        yield nn.Conv2d(3, 4, (5, 3), padding="valid", stride=(1, 2), **F64), (2, 3, 7, 8), scheme
        for mode in ("reflect", "replicate", "circular"):
            yield nn.Conv2d(3, 4, (3, 5), stride=(2, 1), padding=(1, 2), padding_mode=mode, **F64), (2, 3, 7, 8), scheme
    yield nn.Conv2d(3, 4, (3, 4), padding="same", padding_mode="reflect", **F64), (2, 3, 7, 8), "spatial"
    yield nn.Conv2d(3, 4, (1, 5), padding=(0, 2), **F64), (2, 3, 7, 8), "spatial"


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("layer", "shape", "scheme"), conv_settings(), ids=lambda v: str(v)[:70])
def test_two_layers_are_one_with_the_product_of_their_weights(layer, shape, scheme):
    inputs = weight(*shape, seed=1)
    pair, product = pair_of(layer, 2, scheme)
    with torch.no_grad():
        layer.weight.copy_(product)
        assert torch.allclose(pair(inputs), layer(inputs), atol=1e-12)
    assert [type(part) for part in pair] == [type(layer)] * 2
    assert pair[0].bias is None
    assert pair[1].bias is layer.bias


def test_spatial_factors_are_a_column_and_a_row_kernel():
    layer = nn.Conv2d(3, 4, (5, 2), stride=(2, 3), padding=(1, 1), dilation=(2, 1))
    first, second = lowrank.factorised(layer, LayerPlan(rank=6, scheme="spatial"))
    assert (first.kernel_size, first.stride, first.padding, first.dilation) == ((5, 1), (2, 1), (1, 0), (2, 1))
    assert (second.kernel_size, second.stride, second.padding, second.dilation) == ((1, 2), (1, 3), (0, 1), (1, 1))
    assert tuple(first.weight.shape) == (6, 3, 5, 1)
    assert tuple(second.weight.shape) == (4, 6, 1, 2)


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_full_rank_gives_the_same_outputs_in_float32(scheme):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, 3, padding=1)
    full = LayerSpec("c", "conv2d", (12, 8, 3, 3), 1).full_rank(scheme)
    inputs = torch.randn(2, 8, 10, 10)
    pair, _ = pair_of(layer, full, scheme)
    with torch.no_grad():
        assert (pair(inputs) - layer(inputs)).abs().max() < 1e-5
        cut, _ = pair_of(layer, full // 2, scheme)
        assert (cut(inputs) - layer(inputs)).abs().max() > 1e-2


def test_a_weight_of_low_rank_is_found_exactly():
    layer = nn.Linear(40, 30, **F64)
    with torch.no_grad():
        layer.weight.copy_(weight(30, 3, seed=2) @ weight(3, 40, seed=3))
    pair, product = pair_of(layer, 3)
    assert torch.allclose(product, layer.weight, atol=1e-10)
    inputs = weight(5, 40, seed=4)
    assert torch.allclose(pair(inputs), F.linear(inputs, layer.weight, layer.bias), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factors_have_the_layers_dtype_and_mode_and_draw_nothing_random(dtype):
    layer = nn.Conv1d(4, 6, 3, dtype=dtype).eval()
    before = torch.get_rng_state()
    pair = lowrank.factorised(layer, LayerPlan(rank=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.dtype for p in pair.parameters()} == {dtype}
    assert not pair.training
    assert all(p.requires_grad and p.is_leaf for p in pair.parameters())


def test_replacing_a_layer():
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model, new = nn.Sequential(inner, nn.Linear(2, 2)), nn.Linear(2, 2)
    assert lowrank.replace(model, "0.0", new) is model
    assert model[0][0] is new
    assert lowrank.replace(model, "", new) is new
