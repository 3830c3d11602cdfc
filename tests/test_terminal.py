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
