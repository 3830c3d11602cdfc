"""The exceptions that autocompress raises for what a user can mend."""


class AutocompressError(Exception):
    """Base of every error raised on purpose; its text is one line for a user."""

    exit_code = 1


class UsageError(AutocompressError):
    """A user's mistake: a wrong name, value, file or option (exit code 2)."""

    exit_code = 2


class TaskError(UsageError):
    """A task that cannot be loaded, or does not keep the contract of `Task`."""


class SpaceError(UsageError):
    """A search space that is malformed or does not fit the model."""


class PlanError(UsageError):
    """A plan that the model's layers cannot carry out."""


class DataMissing(UsageError):
    """A data set that is not in any of the folders looked at."""


class StudyError(UsageError):
    """A study that does not exist, is occupied, or belongs to something else."""


class StudyBusy(StudyError):
    """A study that another process is searching."""


class RecordError(AutocompressError):
    """A file, of a study or asked for, that cannot be read or written: a full disk, a failing one."""


class ArtifactError(AutocompressError):
    """A compressed file that is damaged, hostile, or not for this model.

    What it quotes of the file may be of any length, in any number of lines: its text is the beginning, in one line.
    """

    def __init__(self, text: str = ""):
        line = " ".join(text[:4000].splitlines())
        super().__init__(line if len(line) <= 1000 else line[:1000] + " ...")


class TrialFailed(AutocompressError):
    """A trial that could not finish, such as one whose loss became NaN."""


class ExportError(AutocompressError):
    """An export that could not be made, or that did not pass its verification."""


class TrackingError(AutocompressError):
    """A tracking store that cannot be reached or written."""
