"""Tasks: loading from files, modules and names; the check; batches; fingerprints; base models."""

import copy
import random
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from autocompress.errors import AutocompressError, DataMissing, TaskError, TrialFailed
from autocompress.tasks import batches as B
from autocompress.tasks import builtin, nets, pretrain
from autocompress.tasks.fingerprint import fingerprint
from autocompress.tasks.loading import check_task, load_task
from autocompress.tasks.task import Task
from autocompress.tasks.training_recipe import TrainingRecipe


def pair(count=20, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=draw), torch.randint(0, 2, (count,), generator=draw)


def fraction(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean().item()


def small(**changes):
    torch.manual_seed(0)
    fields = {
        "model": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2)),
        "train": pair(20, 0),
        "val": pair(9, 1),
        "test": pair(9, 2),
        "loss": F.cross_entropy,
        "metric": fraction,
        "name": "small",
    }
    return Task(**fields | changes)


# --- loading ---------------------------------------------------------------------------------

FILE = """
import torch
from torch import nn
import autocompress as ac
from {sibling} import SIZE

def loss(outputs, targets):
    return ((outputs - targets) ** 2).mean()

def metric(outputs, targets):
    return loss(outputs, targets).item()

def data(n):
    return torch.randn(n, SIZE), torch.randn(n, 1)

def task() -> ac.Task:
    return ac.Task(model=nn.Linear(SIZE, 1), train=data(8), val=data(4), test=data(4), loss=loss, metric=metric,
                   direction="minimize"{more})

def wide(data_dir=None) -> "ac.Task":
    return ac.Task(model=nn.Linear(SIZE, 1), train=data(8), val=data(4), test=data(4), loss=loss, metric=metric,
                   metric_name=str(data_dir))

def number():
    return 3
"""


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


@pytest.fixture
def file(tmp_path):
    """A user's file with a sibling that it imports; names differ between tests, for sys.modules stays."""
    sibling = f"sibling_{abs(hash(tmp_path))}"
    write(tmp_path, f"{sibling}.py", "SIZE = 5\n")
    return write(tmp_path, "my-net.py", FILE.format(sibling=sibling, more=""))


def test_a_file_task_with_a_sibling_import(file, tmp_path):
    path_before = list(sys.path)
    task = load_task(f"{file}:task")
    assert task.model.in_features == 5
    assert task.name == "my-net"
    assert sys.path == path_before
    assert sys.modules[task.loss.__module__].loss is task.loss, "the module can be found, so that it can be pickled"
    check_task(task)
    assert load_task(str(file)).name == "my-net", "the function may be left out"
    assert load_task(f"{file}:wide").name == "wide"


def test_a_tasks_own_name_stays(file):
    own = write(file.parent, "own.py", file.read_text().replace('"minimize"', '"minimize", name="mine"'))
    assert load_task(str(own)).name == "mine"


def test_data_dir_reaches_functions_that_take_it(file, tmp_path):
    assert load_task(f"{file}:wide", data_dir=tmp_path).metric_name == str(tmp_path)
    assert load_task(f"{file}:wide").metric_name == "None"
    load_task(f"{file}:task", data_dir=tmp_path)


def test_two_files_of_one_stem_stay_apart(tmp_path):
    text = "from autocompress import Task\nWHICH = {}\ndef which(): return WHICH\ndef task(): return Task(*which())"
    for name in ("a", "b"):
        write(tmp_path, f"{name}/same.py", text.format(repr(name)))
    for name in ("a", "b"):
        with pytest.raises(TaskError):  # its fields are missing; what counts is which module it ran in
            load_task(str(tmp_path / name / "same.py"))
    loaded = [m for n, m in sys.modules.items() if n.startswith("autocompress_user_task_same")]
    assert sorted(m.which() for m in loaded if Path(m.__file__).is_relative_to(tmp_path)) == ["a", "b"]


def test_an_edited_file_is_read_again(tmp_path, file):
    assert load_task(f"{file}:task").direction == "minimize"
    file.write_text(file.read_text().replace('"minimize"', '"maximize" '))
    assert load_task(f"{file}:task").direction == "maximize"


def test_a_module_task_from_the_current_folder(file, monkeypatch):
    (file.parent / "module_task_here.py").write_text(file.read_text())
    monkeypatch.chdir(file.parent)
    task = load_task("module_task_here:task")
    assert task.name == "module_task_here"
    assert "module_task_here" in sys.modules


BROKEN = {
    "raises at import": ("import math\n\nmath.sqrt(-1)\n", "", r"broken\.py line 3: ValueError: .*"),
    "raises in the call": (
        "def task():\n    return helper()\ndef helper():\n    return {}['key']\n",
        "",
        r"line 4: KeyError",
    ),
    "raises below a library": (
        "import json\ndef task():\n    return json.loads('{')\n",
        "",
        r"broken\.py line 3: JSONDecodeError",
    ),
    "syntax": ("def task(:\n    pass\n", "", r"broken\.py line 1: SyntaxError"),
    "exits": ("raise SystemExit(3)\n", "", r"line 1: SystemExit: 3"),
    "message of two lines": ("raise ValueError('one\\ntwo')\n", "", r"ValueError: one two"),
    "no such import": ("import not_a_module_at_all\n", "", r"line 1: ModuleNotFoundError: .*not_a_module_at_all"),
    "no such function": (
        "def one(): pass\ndef two(): pass\n",
        ":three",
        r"no function 'three'; functions there: one, two",
    ),
    "nothing to choose": ("def one(): pass\n", "", r"no function is named task .*functions there: one"),
    "too much to choose": (
        "from autocompress import Task\ndef one() -> Task: ...\ndef two() -> 'Task': ...\n",
        "",
        r"several functions return a Task.*one, two",
    ),
    "returns a number": ("def task(): return 3\n", "", r"returned 3, allowed: an autocompress.Task"),
    "returns nothing": ("def task(): pass\n", "", r"returned None, allowed"),
    "not a function": ("task = 3\n", ":task", r"is 3, allowed: a function"),
    "wants an argument": ("def task(size): pass\n", "", r"needs an argument 'size'"),
    "wrong keyword": (
        "from autocompress import Task\ndef task(): return Task(modle=1)\n",
        "",
        r"line 2: TypeError: .*modle",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_users_mistake_is_one_line(tmp_path, case):
    text, function, said = BROKEN[case]
    path = write(tmp_path, "broken.py", text)
    modules = set(sys.modules)
    with pytest.raises(TaskError, match=said) as caught:
        load_task(f"{path}{function}")
    assert "\n" not in str(caught.value)
    assert "broken.py" in str(caught.value)
    if "import" in case:
        assert set(sys.modules) == modules, "a file that did not load leaves no module"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("digit", "did you mean digits"),
        ("mnist-lenet", "mnist-lenet5"),
        (
            "",
            "allowed: digits, mnist-lenet300, mnist-lenet5, fashion-lenet300, fashion-lenet5, cifar10-resnet8, module",
        ),
        ("nowhere/none.py:task", "'nowhere/none.py' does not exist"),
        ("nowhere/none.py", "'nowhere/none.py' does not exist"),
        ("no_such_module_here:task", "'no_such_module_here' does not exist"),
        ("no_such_package_here.sub:task", "'no_such_package_here.sub' cannot be imported"),
        ("folder/file:task", "task module is 'folder/file', allowed"),
        ("json:task", "json has no function 'task'"),
    ],
)
def test_an_unknown_spec_is_one_line(spec, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError) as caught:
        load_task(spec)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_built_in_task_without_data_says_so_at_once(tmp_path):
    for name in ("mnist-lenet300", "mnist-lenet5", "fashion-lenet300", "fashion-lenet5", "cifar10-resnet8"):
        with pytest.raises(DataMissing, match="autocompress data get"):
            load_task(name, data_dir=tmp_path)


# --- checking --------------------------------------------------------------------------------


def test_a_check_leaves_everything_untouched():
    loader_draw = torch.Generator().manual_seed(3)
    train = DataLoader(TensorDataset(*pair(20)), batch_size=4, shuffle=True, generator=loader_draw)
    task = small(train=train, val=Augmented())
    task.model.train()
    task.model[1].eval()
    task.model[0].weight.grad = torch.ones(4, 3)
    before = copy.deepcopy(task.model.state_dict())
    states = [torch.get_rng_state(), loader_draw.get_state()], random.getstate(), str(np.random.get_state())
    check_task(task)
    after = [torch.get_rng_state(), loader_draw.get_state()], random.getstate(), str(np.random.get_state())
    assert all(torch.equal(a, b) for a, b in zip(states[0], after[0], strict=True))
    assert states[1:] == after[1:]
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert [m.training for m in task.model] == [True, False, True, True, True]
    assert torch.equal(task.model[0].weight.grad, torch.ones(4, 3))
    assert all(p.grad is None for p in task.model[4].parameters())


class Augmented(Dataset):
    """Draws from every global generator, as augmentation does."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.randn(3) * random.random() * np.random.rand() + i, int(i % 2)


class Endless(IterableDataset):
    def __init__(self, count=10):
        self.count = count

    def __iter__(self):
        return ((torch.ones(3) * i, i % 2) for i in range(self.count))


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, first, second):
        return {"logits": self.layer(first + second), "norm": second.norm()}


class Mappings(Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, i):
        return {"second": torch.ones(3), "first": torch.ones(3) * i}, i % 2


def test_all_kinds_of_models_and_data_are_accepted():
    double = {"model": nn.Linear(3, 2).double()}
    for split in ("train", "val", "test"):
        inputs, targets = pair(9, len(split))
        double[split] = inputs.double(), targets
    frozen = nn.Linear(3, 2).requires_grad_(False)
    mappings = {
        "model": Keywords(),
        "train": Mappings(),
        "val": Mappings(),
        "test": Mappings(),
        "loss": lambda outputs, targets: F.cross_entropy(outputs["logits"], targets),
        "metric": lambda outputs, targets: fraction(outputs["logits"], targets),
    }
    for changes in (
        {},
        double,
        {"model": frozen},
        {"model": nn.Linear(3, 2)},
        mappings,
        {"val": Endless(), "train": DataLoader(Endless(), 4)},
        {"val": [(torch.ones(3), 0), (torch.zeros(3), 1)]},
        {"example_inputs": (torch.ones(2, 3),)},
        {"metric": lambda outputs, targets: np.float32(1)},
        {"metric": lambda outputs, targets: torch.tensor(1)},
    ):
        check_task(small(**changes))


@pytest.mark.gpu
def test_a_model_on_cuda_is_accepted():
    check_task(small(model=nn.Linear(3, 2).cuda()))


def nan_loss(outputs, targets):
    return outputs.sum() * float("nan")


class WithoutGradient(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class OnlyEvaluates(nn.Linear):
    def forward(self, x):
        if self.training:
            raise RuntimeError("not made for training")
        return super().forward(x)


def of_batches() -> nn.Module:
    """A net that normalises by the batch at hand: one example has no variance."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))


SAME = pair(9, 5)
TENSOR = torch.zeros(9, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": 3}, "model is 3, allowed: a torch.nn.Module"),
        ({"model": nn.Linear}, "model is a type, allowed"),
        ({"direction": "max"}, "direction is 'max', allowed: 'maximize' or 'minimize'"),
        ({"loss": None}, "loss is None, allowed: a function"),
        ({"metric": "accuracy"}, "metric is 'accuracy', allowed: a function"),
        ({"batch_size": 0}, "batch_size is 0, allowed: a whole number, 1 or more"),
        ({"batch_size": True}, "batch_size is True"),
        ({"name": ""}, "name is ''"),
        ({"example_inputs": torch.ones(2, 3)}, "example_inputs is a float32 tensor of shape (2, 3), allowed: a tuple"),
        ({"example_inputs": (torch.ones(2, 4),)}, "model fails on example_inputs"),
        ({"model": of_batches()}, "model fails on a single example of val, float32 tensor of shape (1, 3): ValueError"),
        ({"train": 3}, "train is 3, allowed: a Dataset"),
        ({"val": np.zeros((3, 3))}, "val is a float64 ndarray of shape (3, 3), allowed: a Dataset"),
        ({"test": (torch.zeros(3, 3), np.zeros(3))}, "test is a tuple of ("),
        ({"test": None}, "test is None"),
        (
            {"val": (torch.zeros(3, 3), torch.zeros(4))},
            "val is tensors of shapes (3, 3) and (4,), allowed: the same number",
        ),
        ({"val": (torch.zeros(0, 3), torch.zeros(0))}, "val is empty, allowed: at least one"),
        ({"train": []}, "train is empty"),
        ({"val": Endless(0)}, "val: data is empty"),
        ({"val": [torch.ones(3), torch.ones(3), torch.ones(3)]}, "val: a batch is a Tensor, allowed: a pair"),
        ({"val": [(torch.ones(3), 1, 2)]}, "val: a batch is a list of 3, allowed: a pair"),
        ({"val": [(torch.ones(3), 1), (torch.ones(4), 1)]}, "val gives no batch: RuntimeError"),
        ({"val": SAME, "test": SAME}, "val and test are the same data; the splits must be disjoint"),
        ({"train": SAME, "test": SAME}, "train and test are the same data"),
        ({"train": (TENSOR, SAME[1]), "val": (TENSOR, SAME[1])}, "train and val are the same data"),
        (
            {"model": nn.Linear(4, 2)},
            "model fails in evaluation mode on the first batch of val, float32 tensor of shape (9, 3)",
        ),
        ({"model": OnlyEvaluates(3, 2)}, "model fails in training mode on the first batch of train"),
        (
            {"loss": F.binary_cross_entropy},
            "loss 'binary_cross_entropy' on the first batch of val fails, outputs float32 tensor of shape (9, 2)",
        ),
        ({"loss": nan_loss}, "loss 'nan_loss' on the first batch of val is nan, allowed: a finite"),
        (
            {"loss": lambda o, t: F.cross_entropy(o, t, reduction="none")},
            "is a float32 tensor of shape (9,), allowed: a scalar",
        ),
        ({"loss": lambda o, t: 1.0}, "is a float, allowed: a scalar tensor"),
        ({"model": WithoutGradient(3, 2)}, "has no gradient"),
        ({"metric": lambda o, t: float("nan")}, "metric 'metric' on the first batch of val gave nan"),
        ({"metric": lambda o, t: o}, "allowed: a finite number"),
        ({"metric": lambda o, t: "0.5"}, "gave 0.5, allowed: a finite number"),
        ({"metric": lambda o, t: 1 / 0}, "raised ZeroDivisionError"),
        ({"model": nn.ParameterList([nn.Parameter(torch.ones(2))])}, "model fails in evaluation mode"),
    ],
)
def test_a_field_that_is_wrong_is_one_line(changes, said):
    with pytest.raises(TaskError) as caught:
        check_task(small(**changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_values_is_refused():
    with pytest.raises(TaskError, match=r"model holds no values in '0\.weight', which is on the meta device"):
        check_task(small(model=nn.Sequential(nn.Linear(3, 2)).to("meta")))


# --- batches ---------------------------------------------------------------------------------


def rows(data, batch_size, seed):
    got = list(B.batches(data, batch_size, shuffle_seed=seed, device=None))
    return [len(targets) for _, targets in got], [tuple(row) for x, _ in got for row in x.tolist()]


@pytest.mark.parametrize("kind", ["pair", "dataset"])
@pytest.mark.parametrize(
    ("count", "batch_size", "training", "evaluating"),
    [
        (10, 4, [4, 4, 2], [4, 4, 2]),
        (9, 4, [4, 4], [4, 4, 1]),
        (8, 4, [4, 4], [4, 4]),
        (1, 4, [1], [1]),
        (3, 1, [1, 1, 1], [1, 1, 1]),
    ],
)
def test_every_example_comes_once_but_a_lone_last_one(kind, count, batch_size, training, evaluating):
    data = pair(count)
    data = data if kind == "pair" else TensorDataset(*data)
    expected = [tuple(row) for row in pair(count)[0].tolist()]
    assert rows(data, batch_size, None) == (evaluating, expected)
    sizes, shuffled = rows(data, batch_size, 7)
    assert sizes == training
    assert len(set(shuffled)) == sum(training)
    assert set(shuffled) <= set(expected)
    assert B.num_batches(data, batch_size) == len(training)
    assert B.num_batches(data, batch_size, training=False) == len(evaluating)
    assert B.num_examples(data) == count


@pytest.mark.parametrize("kind", ["pair", "dataset"])
def test_the_order_follows_from_the_seed_alone(kind):
    data = pair(50) if kind == "pair" else TensorDataset(*pair(50))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    once = rows(data, 8, 3)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.manual_seed(2)
    assert rows(data, 8, 3) == once
    assert rows(data, 8, 4) != once
    assert once[1] != rows(data, 8, None)[1]


def test_shuffled_inputs_keep_their_targets():
    data = torch.arange(40.0).reshape(40, 1), torch.arange(40)
    for one in (data, TensorDataset(*data)):
        for x, y in B.batches(one, 7, shuffle_seed=0, device="cpu"):
            assert torch.equal(x[:, 0], y.float())


def test_a_loader_is_passed_through():
    loader = DataLoader(TensorDataset(*pair(9)), batch_size=2)
    assert rows(loader, 100, 5) == rows(pair(9), 2, None)
    assert B.num_batches(loader, 100) == 5
    assert B.num_examples(loader) == 9
    assert B.num_batches(Endless(), 4) is None
    assert B.num_examples(DataLoader(Endless())) is None


def test_predict_is_the_model_on_everything_at_once():
    task = small()
    task.model.train()
    task.model[1].eval()
    expected = copy.deepcopy(task.model).eval()(task.train[0])
    for data in (task.train, TensorDataset(*task.train), DataLoader(TensorDataset(*task.train), 7)):
        outputs, targets = B.predict(task.model, data, batch_size=3)
        torch.testing.assert_close(outputs, expected)
        assert torch.equal(targets, task.train[1])
        assert not outputs.requires_grad
    assert [m.training for m in task.model] == [True, False, True, True, True]
    assert B.evaluate(task, task.model, "train") == pytest.approx(fraction(expected, task.train[1]))


def test_the_mode_comes_back_when_the_model_raises():
    model = nn.Linear(4, 2).train()
    with pytest.raises(RuntimeError):
        B.predict(model, pair(4))
    assert model.training


def test_predict_joins_nested_outputs_and_targets():
    outputs, targets = B.predict(Keywords(), Mappings(), batch_size=3)
    assert outputs["logits"].shape == (7, 2)
    assert outputs["norm"].shape == (3,), "scalars of batches are stacked"
    assert targets.tolist() == [0, 1, 0, 1, 0, 1, 0]
    pairs = [((torch.ones(2) * i, torch.zeros(2)), (float(i), i)) for i in range(5)]

    class Adds(nn.Module):
        def forward(self, a, b):
            return a + b, a

    (total, first), (floats, ints) = B.predict(Adds(), pairs, batch_size=2)
    assert torch.equal(total, first)
    assert total[:, 0].tolist() == floats.tolist() == ints.tolist() == [0, 1, 2, 3, 4]


def test_batches_that_cannot_be_joined_are_named():
    with pytest.raises(TaskError, match="cannot be joined along the first axis"):
        B.join([torch.ones(2, 3), torch.ones(2, 4)])


def test_a_metric_that_is_not_finite_fails_the_trial():
    task = small(metric=lambda outputs, targets: float("inf"), metric_name="r2")
    with pytest.raises(TrialFailed, match="metric 'r2' on test gave inf, allowed: a finite number"):
        B.evaluate(task, task.model, "test")


def test_example_inputs_are_one_example():
    assert B.example_inputs(small())[0].shape == (1, 3)
    given = (torch.ones(2, 3), 4)
    assert B.example_inputs(small(example_inputs=given)) == given
    with pytest.raises(TaskError, match="give example_inputs"):
        B.example_inputs(small(model=Keywords(), val=Mappings()))


# --- fingerprints ----------------------------------------------------------------------------


def changed(part, index):
    tensors = [t.clone() for t in part]
    tensors[index].view(-1)[-1] += 1
    return tuple(tensors)


def test_a_fingerprint_changes_with_its_part_alone():
    base = fingerprint(small())
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in base.values())
    assert fingerprint(small()) == base

    model = copy.deepcopy(small().model)
    model[4].bias.data[1] += 1e-6
    other_layer = copy.deepcopy(small().model)
    other_layer[2] = nn.GELU()
    buffer = copy.deepcopy(small().model)
    buffer[1].running_mean[0] += 1
    dropout = copy.deepcopy(small().model)
    dropout[3].p = 0.25
    for key, variants in {
        "model": [{"model": m} for m in (model, other_layer, buffer, dropout)],
        "data": [
            {split: changed(getattr(small(), split), index)} for split in ("train", "val", "test") for index in (0, 1)
        ],
        "metric": [{"loss": F.nll_loss}, {"metric": builtin.accuracy}, {"direction": "minimize"}],
    }.items():
        for variant in variants:
            other = fingerprint(small(**variant))
            assert {k for k in base if other[k] != base[k]} == {key}, variant


def test_fingerprints_of_data_sets_look_at_items_and_length_of_train():
    task = small(train=Augmented(), val=TensorDataset(*pair(200, 1)), test=DataLoader(Endless(), 4))
    torch.manual_seed(1)
    base = fingerprint(task)
    torch.manual_seed(2)
    random.seed(2)
    assert fingerprint(task) == base
    assert fingerprint(replace(task, val=TensorDataset(*changed(pair(200, 1), 0))))["data"] != base["data"]
    assert fingerprint(replace(task, val=TensorDataset(*pair(199, 1))))["data"] != base["data"]
    assert fingerprint(replace(task, train=TensorDataset(*pair(12))))["data"] == base["data"]
    assert fingerprint(replace(task, train=TensorDataset(*pair(13))))["data"] != base["data"]
    assert fingerprint(replace(task, test=DataLoader(Endless(3), 4)))["data"] != base["data"]


def test_odd_tensors_have_fingerprints():
    model = nn.Module()
    for k, value in enumerate(
        (torch.ones(2, dtype=torch.bfloat16), torch.tensor(3), torch.zeros(0), torch.ones(3, 2).T)
    ):
        model.register_buffer(f"b{k}", value)
    first = fingerprint(small(model=model))["model"]
    model.b3 = model.b3.contiguous()
    assert fingerprint(small(model=model))["model"] == first, "memory order does not count"
    model.b0 = model.b0.float()
    assert fingerprint(small(model=model))["model"] != first, "dtype counts"


def test_a_fingerprint_is_the_same_in_another_process(file):
    program = (
        "import sys, torch; from autocompress.tasks.fingerprint import fingerprint\n"
        "from autocompress.tasks.loading import load_task\n"
        "torch.manual_seed(0); print(fingerprint(load_task(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True)
    torch.manual_seed(0)
    assert done.stdout.strip() == str(fingerprint(load_task(str(file))))


# --- built-in tasks and base models ----------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def own_cache(cache, monkeypatch):
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(cache))
    return cache


def test_digits_is_well_trained_and_cached(own_cache):
    said = []
    task = load_task("digits", progress=said.append)
    check_task(task)
    assert [len(split[0]) for split in (task.train, task.val, task.test)] == [1197, 300, 300]
    assert B.evaluate(task, task.model, "test") >= 0.98
    assert task.example_inputs[0].shape == (1, 1, 8, 8)
    assert said
    again = load_task("digits", progress=lambda text: pytest.fail(f"trained again: {text}"))
    assert fingerprint(again) == fingerprint(task)
    assert not again.model.training
    seen = {image.numpy().tobytes() for image in task.train[0]}
    assert not seen & {image.numpy().tobytes() for split in (task.val, task.test) for image in split[0]}


def test_the_splits_hold_every_example_once():
    parts = builtin._split((np.arange(100), np.arange(100)), (70, 20, 10))
    assert [len(part[0]) for part in parts] == [70, 20, 10]
    assert sorted(np.concatenate([part[0] for part in parts])) == list(range(100))
    again = builtin._split((np.arange(100), np.arange(100)), (70, 20, 10))
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize(
    ("build", "size", "count"),
    [("digits_net", 8, 38_282), ("lenet300", 28, 266_610), ("lenet5", 28, 431_080), ("resnet8", 32, 77_946)],
)
def test_the_nets_are_those_of_the_literature(build, size, count):
    net = getattr(nets, build)()
    assert sum(p.numel() for p in net.parameters()) == count
    assert net(torch.zeros(2, 3 if size == 32 else 1, size, size)).shape == (2, 10)
    assert type(net) is nn.Sequential


TOY = TrainingRecipe(epochs=2, batch_size=8, learning_rate=0.01, shift=1, flip=True)


def toy_net():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))


def toy_data():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(32, 1, 4, 4, generator=draw), torch.randint(0, 2, (32,), generator=draw)


def toy(**changes):
    recipe = replace(TOY, **changes)
    return pretrain.base_model("toy", toy_net, recipe, toy_data(), data_version="1", progress=lambda text: None)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "fresh"))
    return tmp_path / "fresh" / "models"


def files(folder):
    return sorted(path for path in folder.iterdir() if path.suffix != ".lock")


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_training_is_deterministic_and_leaves_the_random_state(fresh):
    state = torch.get_rng_state()
    first = toy()
    assert torch.equal(torch.get_rng_state(), state)
    files(fresh)[0].unlink()
    torch.manual_seed(123)
    assert equal(toy(), first)
    assert not equal(toy(seed=1), first)
    assert len(files(fresh)) == 2, "another recipe has another file"


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "other net"])
def test_a_damaged_cache_file_is_trained_anew(fresh, damage, caplog):
    from safetensors.torch import save

    first = toy()
    (path,) = files(fresh)
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[:-9], "empty": b"", "noise": b"x" * 99, "other net": save({"0.weight": torch.ones(2)})}[damage]
    )
    assert equal(toy(), first)
    assert path.read_bytes() == whole
    assert "damaged" in caplog.text
    assert len(files(fresh)) == 1


def test_an_unusable_cache_folder_is_done_without(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path / "file"))
    assert equal(toy(), toy())
    assert caplog.text.count("cannot be used") == 1, "told once"


@pytest.mark.slow
def test_processes_at_once_train_once(fresh):
    program = textwrap.dedent(
        """
        import time, torch
        from torch import nn
        from autocompress.tasks import pretrain
        from autocompress.tasks.training_recipe import TrainingRecipe
        net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        real = pretrain.train
        def slow(*arguments):
            print("trained", flush=True)
            time.sleep(1)
            return real(*arguments)
        pretrain.train = slow
        data = torch.ones(8, 1, 2, 2), torch.zeros(8, dtype=torch.int64)
        recipe = TrainingRecipe(epochs=1, batch_size=4, learning_rate=0.01)
        model = pretrain.base_model("p", net, recipe, data, data_version="1", progress=lambda text: None)
        print(model[1].weight.sum().item())
        """
    )
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [line for process in running for line in process.communicate(timeout=120)[0].splitlines()]
    assert lines.count("trained") == 1
    assert len({line for line in lines if line != "trained"}) == 1
    assert len(lines) == 3


def test_images_are_scaled_and_split_as_told(tmp_path, monkeypatch, fresh):
    """A built-in image task on tiny files: every pixel comes back from the normalised tensors."""
    from test_data import contents, put

    made = contents(train=36, test=6)
    put(tmp_path / "MNIST" / "raw", made)
    task = load_task("mnist-lenet300", data_dir=tmp_path, progress=lambda text: None)
    assert [len(split[0]) for split in (task.train, task.val, task.test)] == [33, 3, 6]
    pixels = (task.test[0] * 0.3081 + 0.1307) * 255
    assert pixels.round().to(torch.uint8).numpy().tobytes() == made["t10k-images-idx3-ubyte"][16:]
    assert task.test[1].to(torch.uint8).numpy().tobytes() == made["t10k-labels-idx1-ubyte"][8:]
    check_task(task)


def test_an_error_of_this_package_passes_through_a_users_function(tmp_path):
    path = write(
        tmp_path, "passes.py", "from autocompress.errors import DataMissing\ndef task(): raise DataMissing('no data')\n"
    )
    with pytest.raises(DataMissing, match=r"^no data$"):
        load_task(str(path))
    assert issubclass(DataMissing, AutocompressError)


@pytest.mark.parametrize("shape", [(5, 4, 6), (5, 4, 6, 3)])
def test_pixels_are_scaled_channel_by_channel(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    channels = shape[3] if len(shape) == 4 else 1
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25)[:channels]
    scale = builtin._Scale(255.0, mean if channels > 1 else mean[0], std if channels > 1 else std[0])
    images, labels = scale((pixels, np.arange(5, dtype=np.uint8)))
    assert images.shape == (5, channels, 4, 6)
    assert labels.dtype == torch.int64
    for c in range(channels):
        plain = pixels[..., c] if channels > 1 else pixels
        np.testing.assert_allclose(images[:, c].numpy(), (plain / 255 - mean[c]) / std[c], rtol=1e-5, atol=1e-5)


def test_the_weights_of_resnet8_come_with_the_package(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (30, 32, 32, 3), np.uint8), np.arange(30, dtype=np.uint8) % 10
    monkeypatch.setattr(builtin.data_sets, "images", lambda name, folder: (images, labels, images[:9], labels[:9]))
    task = load_task("cifar10-resnet8", data_dir=tmp_path)
    check_task(task)
    assert [len(part[0]) for part in (task.train, task.val, task.test)] == [27, 3, 9]
    assert task.model[1].num_batches_tracked == 80 * 351  # trained for 80 epochs of 45,000 // 128 batches
    assert not task.model.training
