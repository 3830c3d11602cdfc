"""Trains the weights that the package carries for the task `cifar10-resnet8`: 80 epochs, half an hour on one core.

    python scripts/train_cifar10_resnet8.py OUT.safetensors --data-dir DATA [--epochs N]

SGD with Nesterov momentum on a one-cycle learning rate (Smith 2018, arXiv 1803.09820), forward passes in bfloat16,
images cropped and mirrored at random. The last weights are kept, none are chosen.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.tasks import nets
from autocompress.tasks.batches import evaluate
from autocompress.tasks.loading import load_task
from autocompress.tasks.task import Task

BATCH = 128


def train(model: nn.Module, task: Task, epochs: int, seed: int = 0) -> None:
    """Train the model in place on the task's training split."""
    images, labels = task.train
    generator = torch.Generator().manual_seed(seed)
    steps = len(images) // BATCH
    optimiser = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9, nesterov=True, weight_decay=2e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 0.2, total_steps=epochs * steps, pct_start=0.2, cycle_momentum=False
    )
    began = time.monotonic()
    for epoch in range(epochs):
        total = 0.0
        model.train()
        for chosen in torch.randperm(len(images), generator=generator)[: steps * BATCH].split(BATCH):
            loss = _loss(model, task.augment(images[chosen], generator), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() / steps
        val = evaluate(task, model, "val")
        print(f"epoch {epoch + 1}: loss {total:.4f}, val {val:.4f}, {time.monotonic() - began:.0f} s", flush=True)
    model.eval()


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16):
        outputs = model(images)
    return F.cross_entropy(outputs.float(), labels)


def main() -> None:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=80)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = load_task("cifar10-resnet8", data_dir=options.data_dir)
    model = nets.resnet8().to(memory_format=torch.channels_last)
    train(model, task, options.epochs)
    print(f"test {evaluate(task, model, 'test'):.4f}")
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, options.out)


if __name__ == "__main__":
    main()
