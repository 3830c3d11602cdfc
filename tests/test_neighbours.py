"""The auto-logistic model against convolutions, an optimiser of torch's, and matrices drawn from it."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from autocompress.codec import container
from autocompress.codec.tensors import Artifact
from autocompress.compress import neighbours, rate
from autocompress.compress.rate import RatedCode

OFFSETS = ((0, 1), (0, 3), (1, 0))


def drawn(rows, columns, base, pulls, seed=0, sweeps=30):
    """A matrix of zeros and ones from the model, by Gibbs sampling over one colour of a chessboard at a time."""
    generator = torch.Generator().manual_seed(seed)
    z = (torch.rand(rows, columns, generator=generator) < 0.3).float()
    p = torch.sigmoid(base).expand(rows, columns)
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    for _ in range(sweeps):
        for colour in range(4):
            logit = base.expand(rows, columns).clone()
            for offset, pull in zip(OFFSETS, pulls, strict=True):
                logit += pull * summed(z - p, offset)
            fresh = (torch.rand(rows, columns, generator=generator) < torch.sigmoid(logit)).float()
            z = torch.where((i * 2 + j) % 4 == colour, fresh, z)
    return z


def summed(values, offset):
    """Of each element the two neighbours, as a convolution."""
    r, c = offset
    kernel = torch.zeros(2 * r + 1, 2 * c + 1, dtype=values.dtype)
    kernel[0, 0] = kernel[-1, -1] = 1
    return F.conv2d(values[None, None], kernel[None, None], padding=(r, c))[0, 0]


def maximised(z, odds):
    """t by torch's LBFGS on the penalised pseudo-likelihood, in float64."""
    natural = odds.double() * math.log(2)
    p = torch.sigmoid(natural)
    parts = [torch.ones_like(p), natural, *(summed(z.double() - p, at) for at in OFFSETS)]
    start = neighbours.prior(OFFSETS)
    t = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([t], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        logit = sum(a * part for a, part in zip(t, parts, strict=True))
        value = F.binary_cross_entropy_with_logits(logit, z.double(), reduction="sum")
        value = value + 0.5 * (t - start).square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return t.detach(), sum(a * part for a, part in zip(t.detach(), parts, strict=True)) / math.log(2)


def odds_of(z):
    (row, column), _ = rate.model_of(z, 1)
    return row + column


def test_newtons_steps_find_the_maximum():
    z = drawn(14, 25, torch.linspace(-2, 0, 14)[:, None], (0.8, 0.5, -0.3), sweeps=8)
    wanted, logits = maximised(z, odds_of(z))
    given, t = neighbours.fit(z, odds_of(z), OFFSETS, neighbours.prior(OFFSETS), 12)
    torch.testing.assert_close(t, wanted, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(given.double(), logits, atol=1e-3, rtol=1e-3)
    near, _ = neighbours.fit(z, odds_of(z), OFFSETS, neighbours.prior(OFFSETS), neighbours.FIRST)
    assert (near - given).abs().max() < 0.1


def test_pulls_of_the_model_that_drew_a_matrix_are_found():
    pulls = (0.6, 0.4, -0.4)
    odds = (torch.randn(60, 1, generator=torch.Generator().manual_seed(1)) - 1) / math.log(2)
    z = drawn(60, 80, odds * math.log(2), pulls, sweeps=12)
    _, t = neighbours.fit(z, odds.expand(60, 80), OFFSETS, neighbours.prior(OFFSETS), 8)
    assert t.tolist() == pytest.approx([0, 1, *pulls], abs=0.15)


def test_without_any_pull_nothing_is_told():
    z = (torch.rand(80, 90, generator=torch.Generator().manual_seed(2)) < 0.2).float()
    _, t = neighbours.fit(z, torch.full((80, 90), -2.0), OFFSETS, neighbours.prior(OFFSETS), 8)
    assert t[2:].abs().max() < 0.15


def test_blocks_of_rows_change_nothing(monkeypatch):
    z = drawn(15, 24, torch.full((15, 1), -1.0), (0.8, 0.5, 0.3), sweeps=3)
    whole = neighbours.fit(z, odds_of(z), OFFSETS, neighbours.prior(OFFSETS), 3)
    monkeypatch.setattr(neighbours, "_BLOCK", 24 * 4)
    torch.testing.assert_close(neighbours.fit(z, odds_of(z), OFFSETS, neighbours.prior(OFFSETS), 3), whole)


def test_log_odds_are_the_derivative_of_all_bits():
    """-log P of a matrix of the auto-logistic model, up to its constant, told element by element."""
    z = drawn(5, 7, torch.full((5, 1), -1.0), (0.8, 0.5, 0.3), sweeps=2)
    odds = odds_of(z)
    given, t = neighbours.fit(z, odds, OFFSETS, neighbours.prior(OFFSETS), 2)
    p = torch.sigmoid(odds * math.log(2))

    def bits(z):
        field = t[0] + t[1] * odds * math.log(2) - sum(a * summed(p, at) for a, at in zip(t[2:], OFFSETS, strict=True))
        pairs = sum(a * (z * summed(z, at)).sum() / 2 for a, at in zip(t[2:], OFFSETS, strict=True))
        return -((field * z).sum() + pairs) / math.log(2)

    for i, j in ((0, 0), (2, 3), (4, 6)):
        one, none = z.clone(), z.clone()
        one[i, j], none[i, j] = 1.0, 0.0
        assert float(bits(one) - bits(none)) == pytest.approx(-float(given[i, j]), abs=1e-4)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 6, 3, 3), ((0, 1), (0, 3), (0, 9), (1, 0))),
        ((8, 1, 5, 5), ((0, 1), (0, 5), (1, 0))),  # one channel: the next one's kernel is not there
        ((8, 6, 1, 1), ((0, 1), (1, 0))),
        ((8, 4, 5), ((0, 1), (0, 5), (1, 0))),
    ],
)
def test_a_kernels_neighbours_are_its_rows_and_the_next_channels(shape, expected):
    assert neighbours.offsets_of(torch.ones(shape[0], math.prod(shape[1:])), shape) == expected


def test_the_rows_of_an_image_are_found_in_a_linear_layer():
    image = torch.zeros(10, 12)
    image[2:8, 3:9] = 1
    density = 0.05 + 0.7 * image.flatten()
    z = (torch.rand(200, 120, generator=torch.Generator().manual_seed(3)) < density).float()
    assert neighbours.offsets_of(z, (200, 120)) == ((0, 1), (0, 12), (1, 0))
    assert neighbours.offsets_of(torch.ones(5, 40), (5, 40)) == ((0, 1), (1, 0))


def test_a_weight_in_a_cluster_costs_less_than_one_alone_as_the_coder_has_it():
    z = drawn(300, 200, torch.full((300, 1), -2.5), (1.5, 0.0, 1.2), seed=4)
    signs = torch.where(torch.rand(z.shape, generator=torch.Generator().manual_seed(5)) < 0.5, -1.0, 1.0)
    code = RatedCode(z * signs * 0.5, 3, 0.5, 1.0)
    for _ in range(2 * neighbours.EVERY):
        code.count()
    by_place = odds_of(z)
    near = (summed(z, (0, 1)) + summed(z, (1, 0))) / 4
    assert code.odds[near > 0.7].mean() > code.odds[near == 0].mean() + 3
    cells = torch.where(z > 0, -code.odds, code.odds)
    plain = torch.where(z > 0, -by_place, by_place)
    told = [float(torch.logaddexp2(torch.zeros_like(x), x).sum()) / 8 for x in (cells, plain)]
    written = len(container.pack(Artifact({"w": code.encode()}))) - z.sum() / 8  # a sign is a bit
    assert told[0] < written < told[1]  # the pseudo-likelihood tells each pair twice, the places not at all


def test_bits_of_a_matrix_that_is_all_the_same_stay_finite():
    for value in (0.0, 1.0):
        code = RatedCode(torch.full((6, 8), value), 3, 0.5, 1.0)
        code.count()
        assert torch.isfinite(code.odds).all()
        assert (code.odds < 0).all() == (value == 0.0)
        assert np.isfinite(rate.slopes(code.weights.detach() / 0.5, code.odds, code.rises).numpy()).all()
