"""Augmentation: against brute force, and as finetuning uses it."""

import pickle
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from autocompress.errors import TaskError
from autocompress.plan import LayerPlan, Plan, Recipe
from autocompress.tasks.augment import Augment, augmented
from autocompress.tasks.checking import check_task
from autocompress.tasks.task import Task
from autocompress.trial import Budget, Workbench, run_trial


def images(count=40, size=6):
    return torch.rand(count, 2, size, size) + 1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_flip_gives_each_image_or_its_mirror():
    x = images()
    y = Augment(flip=True)(x, seeded())
    same = [torch.equal(a, b) for a, b in zip(x, y, strict=True)]
    mirrored = [torch.equal(a.flip(2), b) for a, b in zip(x, y, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 8 < sum(mirrored) < 32  # of 40: outside with a chance of 1e-4


def test_a_shift_rolls_the_whole_batch():
    x = images()
    allowed = {(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    seen = set()
    for seed in range(80):
        y = Augment(shift=1)(x, seeded(seed))
        (move,) = [m for m in allowed if torch.equal(x.roll(m, (2, 3)), y)]
        seen.add(move)
    assert seen == allowed


def test_a_crop_is_a_window_of_each_image_with_zeros_around():
    x = images(200, 5)
    y = Augment(crop=2)(x, seeded())
    found = []
    for before, after in zip(x, y, strict=True):
        around = torch.zeros(2, 9, 9)
        around[:, 2:7, 2:7] = before
        (place,) = [(i, j) for i in range(5) for j in range(5) if torch.equal(around[:, i : i + 5, j : j + 5], after)]
        found.append(place)
    assert set(found) == {(i, j) for i in range(5) for j in range(5)}


def test_images_are_left_as_they_are_and_the_global_state_decides():
    x = images()
    before = x.clone()
    augment = pickle.loads(pickle.dumps(Augment(shift=1, flip=True, crop=1)))
    torch.manual_seed(3)
    first = augment(x)
    assert not torch.equal(first, augment(x))
    torch.manual_seed(3)
    assert torch.equal(first, augment(x))
    assert torch.equal(x, before)
    assert torch.equal(Augment()(x), x)


def task(augment):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    splits = [(images(), torch.arange(40) % 3) for _ in range(3)]

    def right(outputs, targets):
        return float((outputs.argmax(1) == targets).float().mean())

    return Task(model, *splits, nn.functional.cross_entropy, right, batch_size=10, augment=augment)


def negative(inputs):
    return -inputs


@pytest.mark.parametrize("augment", [None, negative])
def test_a_feed_guides_by_what_the_model_gives_on_the_very_inputs(augment):
    bench = Workbench(task(augment), "cpu")
    batches = list(bench.feed(0, True).epoch(0))
    assert len(batches) == 4
    for x, _, guide in batches:
        assert (x.max() < 0) == (augment is negative)
        torch.testing.assert_close(guide, bench.model(x))


def test_augmented_trials_follow_from_their_seed():
    def run(seed, augment=Augment(shift=1, flip=True)):  # noqa: B008
        bench = Workbench(task(augment), "cpu")
        plan = Plan({"1": LayerPlan(bits=4)}, Recipe(epochs=2, distillation=0.5))
        *_, outcome = run_trial(bench, plan, Budget(), seed=seed)
        return outcome.artifact

    torch.manual_seed(11)
    random.seed(11)
    first, state = run(1), torch.get_rng_state()
    torch.manual_seed(12)
    assert run(1) == first
    assert run(1, None) != first
    torch.manual_seed(11)
    task(None)  # what `run` itself draws
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("augment", "said"),
    [
        (3, "augment is 3, allowed: a function"),
        (lambda x: x[:, 0, 0, 0], "model fails in training mode"),
        (lambda x: {}["no"], "on the first batch of train augment fails on float32 tensor of shape .*: KeyError"),
        (lambda x: None, "augment makes NoneType of float32 tensor of shape .*, allowed: inputs of the same structure"),
        (lambda x: (x, 0.3), "augment makes tuple of"),
        (lambda x: x.numpy(), "augment makes float32 ndarray of shape"),
        (lambda x: x[:3], "loss 'cross_entropy' on the first batch of train as augment made it fails"),
        (lambda x: x[:, :1], "model fails in training mode on the first batch of train as augment made it"),
    ],
)
def test_a_wrong_augmentation_is_one_line(augment, said):
    with pytest.raises(TaskError, match=said):
        check_task(task(augment))


def test_structures_of_tensors_are_to_stay():
    x, y = torch.ones(2), torch.zeros(3)
    assert augmented(lambda pair: [pair[1], pair[0]], (x, y))[0] is y
    assert augmented(None, (x, y)) == (x, y)
    for made in ((x,), {"a": x}, (x, 3), x):
        with pytest.raises(TaskError, match="of the same structure"):
            augmented(lambda _, made=made: made, (x, y))
    with pytest.raises(TaskError, match="of the same structure"):
        augmented(lambda _: {"b": x}, {"a": x})


def test_an_augmentation_that_fails_later_says_so_in_its_trial():
    calls = []

    def late(x):
        calls.append(x)
        if len(calls) > 3:
            raise IndexError("no such image")
        return x

    plan = Plan({"1": LayerPlan(bits=4)}, Recipe(epochs=2.0))
    with pytest.raises(TaskError, match=r"^augment fails on float32 tensor of shape .*: IndexError: no such image$"):
        list(run_trial(task(late), plan, Budget()))


def test_a_check_runs_the_augmentation_and_leaves_the_random_state():
    calls = []
    augmented = replace(task(None), augment=lambda x: calls.append(1) or Augment(flip=True)(x))
    state = torch.get_rng_state()
    check_task(augmented)
    assert calls == [1]
    assert torch.equal(torch.get_rng_state(), state)
