"""What a search shows before its first trial and after its last: never a silence without a reason."""

import io

import pytest
from rich.console import Console

from autocompress.engine import Job
from autocompress.plan import Plan
from autocompress.terminal import Board


@pytest.fixture
def shown():
    return io.StringIO()


def test_in_a_log_each_step_is_a_line(shown):
    board = Board(Console(file=shown, width=100))
    board.doing("loading task [red]a")
    with board:
        board.doing("starting Ray")
        board.started(Job(0, Plan({}), 0))
        board.started(Job(1, Plan({}), 0))
    assert shown.getvalue().splitlines() == [
        "loading task [red]a",
        "starting Ray",
        "workers load torch and the task",
    ]


def test_on_a_terminal_a_step_is_gone_with_the_next_and_stands_in_the_table(shown):
    board = Board(Console(file=shown, width=100, force_terminal=True))
    board.doing("loading task [red]a")
    assert board._status.status.plain == "loading task [red]a"
    board.doing("measuring")
    assert board._status.status.plain == "measuring"
    with board:
        assert board._status is None
        board.doing("starting Ray")
        with board.console.capture() as seen:
            board.console.print(board._render())
        assert "starting Ray" in seen.get()
    board.__exit__()  # as the command line does, whether it was entered or not


@pytest.mark.parametrize(
    ("budget", "said"),
    [(None, ", 10 min 0 s left"), (90.0, ", 30 s left"), (20.0, ", 0 s left"), (5000.0, ", 10 min 0 s left")],
)
def test_what_is_left_is_no_more_than_the_time_budget(shown, monkeypatch, budget, said):
    clock = [1000.0]
    monkeypatch.setattr("autocompress.terminal.time.monotonic", lambda: clock[0])
    board = Board(Console(file=shown, width=100), budget)
    with board:
        board._first_done = 1000.0
        board._ended = [None] * 4  # the uncompressed model and three trials of 20 s
        clock[0] = 1060.0
        assert board._left(10, 40) == said
        assert board._left(40, 40) == ""
