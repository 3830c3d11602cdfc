"""Trials on a GPU: the CPU's files before training, its course in training, and searches whose workers share one."""

import pytest
import torch
from test_trial import Residual, data, task_of
from torch import nn

import autocompress as ac
from autocompress.codec import container
from autocompress.compress import lineage
from autocompress.compress.artifact import restore
from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.trial import Budget, Workbench, run_trial

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def conv():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 4)),
        nn.Conv2d(1, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 4),
    )


KINDS = {
    "threshold, codebook": LayerPlan(bits=3, threshold=0.5),
    "grid": LayerPlan(bits=3, quantizer="uniform"),
    "asymmetric": LayerPlan(bits=4, quantizer="asymmetric"),
    "by channel": LayerPlan(bits=3, quantizer="uniform", granularity="channel"),
    "binary": LayerPlan(bits=1, quantizer="uniform"),
    "half": LayerPlan(bits=16),
    "activation saliency": LayerPlan(threshold=0.7, saliency="activation"),
    "hessian saliency": LayerPlan(threshold=0.7, saliency="hessian"),
    "hessian rounding": LayerPlan(bits=3, quantizer="uniform", rounding="hessian"),
    "svd": LayerPlan(rank=3, bits=6),
    "svd by activation": LayerPlan(rank=3, svd="activation"),
    "svd by relu": LayerPlan(rank=3, svd="relu"),
    "activations": LayerPlan(bits=8, activation_bits=8),
}
RECIPES = {
    "plain": Recipe(4.0, 5e-3, 0.0),
    "distilled": Recipe(4.0, 5e-3, 0.7),
    "infomax": Recipe(4.0, 5e-3, 0.7, infomax=0.3),
    "accumulated": Recipe(4.0, 5e-3, 0.0, accumulation=2),
    "bfloat16": Recipe(4.0, 5e-3, 0.0, precision="bfloat16"),
    "float16": Recipe(4.0, 5e-3, 0.0, precision="float16"),
}


def task():
    return task_of(conv, train=data(600, 0), val=data(300, 1), batch_size=32)


def outcomes(device, layer, recipe, start=None, rungs=(0.0, 1.0)):
    bench = Workbench(task(), device=device)
    plan = Plan({spec.name: layer for spec in bench.layers}, recipe)
    return list(run_trial(bench, plan, Budget(rungs), seed=4, start=start))


def weights(outcome):
    state = restore(container.unpack(outcome.artifact), conv()).state_dict()
    return {key: tensor.double() for key, tensor in state.items() if tensor.is_floating_point()}


@pytest.mark.parametrize("kind", KINDS)
def test_without_training_the_file_is_the_cpus(kind):
    (here,), (there,) = (outcomes(device, KINDS[kind], Recipe(0.0), rungs=(0.0,)) for device in ("cpu", DEVICE))
    assert there.measurement.size_bytes == pytest.approx(here.measurement.size_bytes, rel=0.03)
    assert there.measurement.metric_val == pytest.approx(here.measurement.metric_val, abs=0.02)
    expected, found = weights(here), weights(there)
    assert expected.keys() == found.keys()
    for key, values in expected.items():
        if "hessian" not in kind and "svd" not in kind:  # one weight that tips over moves others; factors turn signs
            far = (values - found[key]).abs() > 1e-3 * values.abs().max()
            assert far.double().mean() < 0.02, key
    x = task().val[0]
    one, other = (restore(container.unpack(o.artifact), conv()).eval()(x) for o in (here, there))
    assert (one - other).square().mean() < 0.01 * one.var()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["threshold, codebook", "grid", "svd", "activations"])
def test_finetuning_takes_the_cpus_course(kind, recipe):
    exact = "plain" if recipe in ("bfloat16", "float16") else recipe
    here, there = outcomes("cpu", KINDS[kind], RECIPES[exact]), outcomes(DEVICE, KINDS[kind], RECIPES[recipe])
    assert there[-1].measurement.metric_val == pytest.approx(here[-1].measurement.metric_val, abs=0.05)
    assert there[-1].measurement.metric_val > there[0].measurement.metric_val
    assert there[-1].measurement.size_bytes == pytest.approx(here[-1].measurement.size_bytes, rel=0.1)


def rated(device, rate, start=None):
    grid = LayerPlan(bits=5, quantizer="uniform", rounding="hessian")
    return outcomes(device, grid, Recipe(6.0, 5e-3, 0.5, rate), start)


def test_a_price_makes_the_cpus_file():
    here, there = rated("cpu", 0.3), rated(DEVICE, 0.3)
    for one, other in zip(here, there, strict=True):
        assert other.measurement.size_bytes == pytest.approx(one.measurement.size_bytes, rel=0.08)
        assert other.measurement.metric_val == pytest.approx(one.measurement.metric_val, abs=0.04)
    assert there[1].measurement.size_bytes < 0.9 * rated(DEVICE, 0.01)[1].measurement.size_bytes


@pytest.mark.parametrize("kind", ["grid", "svd", "activations"])
def test_a_trial_is_the_same_each_time(kind):
    one, other = (outcomes(DEVICE, KINDS[kind], RECIPES["distilled"]) for _ in range(2))
    assert [o.artifact for o in one] == [o.artifact for o in other]


def test_a_state_goes_on_anywhere():
    state = lineage.unpack(lineage.pack(rated(DEVICE, 0.1)[-1].state()))
    here, there = rated("cpu", 0.3, state), rated(DEVICE, 0.3, state)
    assert there[0].measurement.size_bytes == pytest.approx(here[0].measurement.size_bytes, rel=0.01)
    assert there[-1].measurement.metric_val == pytest.approx(here[-1].measurement.metric_val, abs=0.04)


def test_a_users_own_module_with_shared_weights():
    given = task_of(lambda: Residual(4), train=data(300, 0))
    bench = Workbench(given, device=DEVICE)
    plan = Plan({s.name: LayerPlan(bits=4, threshold=0.3) for s in bench.layers}, Recipe(10.0, 1e-2, 0.0))
    first, last = run_trial(bench, plan, seed=1)
    assert last.measurement.metric_val > first.measurement.metric_val + 0.1
    assert all(tensor.device.type == "cpu" for tensor in given.model.state_dict().values())


@pytest.mark.ray
@pytest.mark.parametrize("sampler", ["tpe", "continuation"])
def test_workers_of_a_search_share_it(sampler, tmp_path):
    study = ac.search(task(), trials=6, workers=2, dir=tmp_path, finetune_epochs=1.0, sampler=sampler)
    assert [t.state for t in study.record.trials].count("complete") == 6
    best = min(study.record.front, key=lambda t: t.best.size_bytes)
    assert torch.isfinite(torch.tensor(best.metric_test))
    assert best.best.size_bytes < 0.5 * study.record.baseline.best.size_bytes
