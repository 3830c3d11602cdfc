"""What data onnx-int8 looks at: training data for ranges, validation data for forms, never the test split."""

from dataclasses import replace

import pytest
import torch
from test_deploy import make_task, mlp
from torch import nn
from torch.nn import functional as F

from autocompress.deploy import int8
from autocompress.deploy.recorder import Recorder
from autocompress.tasks.task import Task


class Untouched:
    """Data that must not be looked at."""

    def __iter__(self):
        raise AssertionError("it was looked at")

    __getitem__ = __len__ = __iter__


def test_ranges_come_from_training_data_alone(tmp_path):
    x = torch.randn(40, 1, 8, 8)
    task = make_task(mlp(), (x,))

    def net(**splits):
        recorder = Recorder(task.model, tmp_path)
        recorder.run("one", recorder.named(x[:2]))
        return int8.net_of(task.model, {"input": x[:2]}, ["output"], recorder, replace(task, **splits))

    found = net(val=Untouched(), test=Untouched())
    assert sum(len(call["input"]) for call in found.calls) == 40
    with pytest.raises(AssertionError, match="it was looked at"):
        net(train=Untouched())


def test_validation_pairs_inputs_with_their_own_targets(tmp_path):
    """Of a loader that shuffles each time it is gone through, in batches of 7."""
    x = torch.randn(300, 5)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1)), 7, shuffle=True)

    class Sum:
        def feed(self, call):
            return call

        def run(self, _, feed):
            return [feed["input"].sum(1)]

    def far(outputs, targets):
        return float((outputs - targets).abs().max()) + len(targets) / 1000

    task = Task(nn.Linear(5, 1), loader, loader, loader, F.mse_loss, far, "minimize")
    recorder = Recorder(task.model, tmp_path)
    recorder.structure = torch.zeros(1)
    assert int8.Validation(task, recorder, tmp_path).metric(Sum()) == pytest.approx(0.3, abs=1e-4)
