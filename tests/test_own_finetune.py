"""A user's own finetune function in place of ours."""

import math
from dataclasses import replace

import pytest
import torch
from test_trial import SMALL, task_of

from autocompress.compress.apply import call_with
from autocompress.compress.finetune import finetune
from autocompress.errors import TaskError, TrialFailed
from autocompress.tasks.checking import check_fields
from autocompress.trial import Budget, Workbench, run_trial


def outcomes(own, plan=SMALL, budget=(0.0, 0.5, 1.0)):
    return list(run_trial(Workbench(replace(task_of(), finetune=own), "cpu"), plan, Budget(budget), seed=1))


def test_ours_as_the_users_own_is_ours():
    assert [o.artifact for o in outcomes(finetune)] == [o.artifact for o in outcomes(None)]


def descent(model, feed, loss, recipe, rungs):
    """As the documentation of `Task` has it: plain gradient descent."""
    trained = [t for code in model.codes.values() for part in code.trained() for t in part]
    optimiser = torch.optim.SGD([*trained, *model.others()], 0.1)
    step, epoch, batches = 0, 0, iter(())
    for rung in rungs:
        model.module.train()
        while step < round(rung * feed.steps):
            batch = next(batches, None)
            if batch is None:
                batches, epoch = feed.epoch(epoch), epoch + 1
                continue
            inputs, targets, guide = batch
            assert guide.shape == (len(inputs), 4)
            optimiser.zero_grad()
            loss(call_with(model.module, model.substitutes(), inputs), targets).backward()
            optimiser.step()
            step += 1
        yield "whatever it yields"


def test_a_loop_written_from_the_documentation_learns():
    longer = replace(SMALL, recipe=replace(SMALL.recipe, epochs=10.0))
    found = [o.measurement for o in outcomes(descent, longer)]
    assert [m.epoch for m in found] == [0.0, 5.0, 10.0]
    assert found[-1].metric_val > found[0].metric_val + 0.1
    again = [o.measurement.metric_val for o in outcomes(descent, longer)]
    assert again == [m.metric_val for m in found]


def lazy(model, feed, loss, recipe, rungs):
    yield rungs[0]


def broken(model, feed, loss, recipe, rungs):
    yield rungs[0]
    raise ValueError("no such\nthing")


def not_finite(model, feed, loss, recipe, rungs):
    yield rungs[0]
    for parameter in model.others():
        parameter.data.fill_(math.nan)
    yield rungs[1]


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (lazy, r"the task's finetune ended before rung 0.5 of \[0.0, 0.5, 1.0\]"),
        (broken, "the task's finetune raised ValueError: no such thing"),
        (lambda *given: None, "the task's finetune raised TypeError: 'NoneType' object is not iterable"),
        (lambda: None, r"the task's finetune raised TypeError: .*takes 0 positional arguments but 5"),
        (not_finite, "holds values that are not finite"),
    ],
)
def test_what_goes_wrong_is_a_failed_trial_in_one_line(own, said):
    nan_metric = {"metric": lambda outputs, y: outputs.mean().item()} if own is not_finite else {}
    bench = Workbench(replace(task_of(), finetune=own, **nan_metric), "cpu")
    with pytest.raises(TrialFailed, match=said) as caught:
        list(run_trial(bench, SMALL, Budget((0.0, 0.5, 1.0))))
    assert "\n" not in str(caught.value)


def test_what_is_no_function_is_refused():
    with pytest.raises(
        TaskError, match=r"finetune is 3, allowed: a function finetune\(model, feed, loss, recipe, rungs"
    ):
        check_fields(replace(task_of(), finetune=3))
