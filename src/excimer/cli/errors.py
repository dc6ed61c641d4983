"""Errors of the command line, and the exit code of every error."""

from typing import Final

from excimer.base.errors import ConflictError, NotFoundError, RefusedError, RetryableError

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_NOT_FOUND: Final = 3
EXIT_UNAVAILABLE: Final = 4
EXIT_INTERRUPTED: Final = 130


class UsageError(RefusedError):
    """Options contradict each other or cannot be understood."""


class StateDirectoryError(RefusedError):
    """The state directory is missing, damaged, or not ours."""


class ProcessFailedError(RefusedError):
    """A process of the installation did not start."""


class NotRunningError(RetryableError):
    """A part of the installation that is needed does not run."""


class BusyError(RetryableError):
    """Another excimer command works on the same installation."""


class StillRunningError(ConflictError):
    """Something must be stopped first."""


def exit_code_of(error: BaseException) -> int:
    if isinstance(error, UsageError):
        return EXIT_USAGE
    if isinstance(error, NotFoundError):
        return EXIT_NOT_FOUND
    if isinstance(error, RetryableError):
        return EXIT_UNAVAILABLE
    return EXIT_FAILED
