"""The hypervolume of a study after each of its trials."""

from __future__ import annotations

from dataclasses import replace

from autocompress.record import StudyRecord, TrialRecord
from autocompress.tracking.runs import SETTLED


class Curve:
    """The hypervolume after each trial in order of number, each computed once.

    A trial's value waits until every trial before it is settled, so that the curve does not
    depend on the order in which the workers came back.
    """

    def __init__(self) -> None:
        self._done: set[int] = set()
        self._front: tuple[TrialRecord, ...] = ()

    def extend(self, record: StudyRecord, *, final: bool = False) -> dict[int, float]:
        """The values that have become known since the last call, by trial number.

        `final` waits for no running trial: nothing more will come.
        """
        values: dict[int, float] = {}
        for trial in record.trials:
            if trial.state not in SETTLED:
                if final:
                    continue
                break
            if trial.number in self._done:
                continue
            base = (record.baseline,) if record.baseline else ()
            pool = {t.number: t for t in (*base, *self._front, trial)}
            so_far = replace(record, trials=tuple(pool.values()))
            self._front = so_far.front
            self._done.add(trial.number)
            values[trial.number] = so_far.hypervolume()
        return values
