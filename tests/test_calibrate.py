"""Statistics of layers' inputs against moments of outputs that torch's own layers compute."""

import pytest
import torch
from torch import nn

from autocompress import Task
from autocompress.compress import calibrate
from autocompress.compress.layers import find_layers
from autocompress.tasks.batches import call_model
from autocompress.trial import Workbench

CONVS = [
    nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2),
    nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), groups=2),
    nn.Conv2d(4, 8, 3, padding="same", padding_mode="reflect", dilation=(1, 2)),
    nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="circular"),
    nn.Conv3d(2, 3, 2, stride=2),
    nn.Linear(7, 5),
]


@pytest.mark.parametrize("module", CONVS, ids=str)
def test_outputs_are_weight_rows_times_patches(module: nn.Module) -> None:
    torch.manual_seed(0)
    inner = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    shape = (3, 5, inner) if isinstance(module, nn.Linear) else (3, inner, *[9] * len(module.kernel_size))
    x = torch.randn(shape)
    rows = calibrate.patches(module, x)
    groups = rows.shape[0]
    weight = module.weight.detach().reshape(groups, -1, rows.shape[2])
    found = torch.einsum("grd,god->rgo", rows, weight).flatten(1) + module.bias.detach()
    with torch.no_grad():
        wanted = module(x)
    channels = wanted.movedim(1, -1) if not isinstance(module, nn.Linear) else wanted
    torch.testing.assert_close(found, channels.reshape(-1, channels.shape[-1]), rtol=1e-5, atol=1e-5)


def test_moments_of_several_batches_are_those_of_all_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    x = torch.randn(50, 5)
    specs = find_layers(model, lambda m: m(x[:1])).layers
    found = calibrate.gather(model, specs, [x[:20], x[20:]], call_model)
    with torch.no_grad():
        hidden = torch.relu(model[0](x)).double()  # eval mode: no dropout
    assert model.training
    assert model[2].training
    assert found["3"].count == 50
    torch.testing.assert_close(found["3"].gram[0].double(), hidden.T @ hidden / 50, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["3"].mean[0].double(), hidden.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["3"].gram[0].diagonal().double(), hidden.square().mean(0), rtol=1e-5, atol=1e-6)


def test_a_shared_layer_counts_the_inputs_of_all_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
            self.other.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(self.one(x))

    model, x = Twice(), torch.randn(10, 3)
    specs = find_layers(model, lambda m: m(x[:1])).layers
    (found,) = calibrate.gather(model, specs, [x], call_model).values()
    with torch.no_grad():
        every = torch.cat([x, model.one(x)])
    assert found.count == 20
    torch.testing.assert_close(found.gram[0], every.T @ every / 20)


def test_weights_that_a_parent_reads_by_itself_have_no_entry() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    specs = find_layers(model, lambda m: m(x[:1])).layers
    assert "self_attn.out_proj" in {spec.name for spec in specs}
    assert "self_attn.out_proj" not in calibrate.gather(model, specs, [x], call_model)


def test_moments_of_a_wide_layer_are_held_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "WIDEST", 5)
    monkeypatch.setattr(calibrate, "PART", 3)
    layer, x = nn.Linear(6, 2), torch.randn(30, 6)
    moments = calibrate.Moments()
    moments.add(layer, x)
    found, whole = moments.statistics(), x.T @ x / 30
    assert found.parts == 2
    torch.testing.assert_close(torch.block_diag(*found.gram), whole * torch.block_diag(*[torch.ones(3, 3)] * 2))
    torch.testing.assert_close(found.gram.diagonal(dim1=1, dim2=2).flatten(), x.square().mean(0))
    assert calibrate.parts_of(7) == 7


def test_rows_are_drawn_where_there_are_many() -> None:
    layer, x = nn.Linear(4, 2), torch.arange(4000.0).reshape(1000, 4)
    rows = calibrate.patches(layer, x, most=100)
    assert rows.shape == (1, 100, 4)
    assert len(torch.unique(rows[0, :, 0])) == 100
    torch.testing.assert_close(rows, calibrate.patches(layer, x, most=100))
    assert abs(rows.mean() - x.mean()) < 400  # three standard errors of the mean of 100


def test_a_bench_gathers_once_and_draws_the_same_examples_in_each_process() -> None:
    torch.manual_seed(0)
    data = torch.randn(600, 5), torch.randint(0, 3, (600,))
    task = Task(
        name="t",
        model=nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)),
        train=data,
        val=data,
        test=data,
        loss=nn.functional.cross_entropy,
        metric=lambda outputs, targets: float((outputs.argmax(1) == targets).float().mean()),
    )
    one, other = Workbench(task), Workbench(task)
    assert one.statistics is one.statistics
    assert one.statistics["0"].count == 256
    assert torch.equal(one.calibration, other.calibration)
