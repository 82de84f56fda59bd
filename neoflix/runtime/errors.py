"""Exceptions and exit codes with a meaning of their own."""

RUN_ME_AGAIN = 75  # exit code: stopped on request; the same command resumes the run (EX_TEMPFAIL of sysexits.h)


class UserError(ValueError):
    """A mistake that the user can correct, in one sentence: what is wrong, where, and the way out.

    The program prints the sentence and exits with code 2, without a traceback. Any other exception is a bug, of ours or
    of a library, and keeps its traceback.
    """

    exit_code = 2


class DivergedError(UserError):
    """The losses or weights are no longer finite numbers. The input was valid, and the program did not fail: the exit
    code is its own."""

    exit_code = 3


class UploadError(UserError):
    """The run is trained and saved, but could not be uploaded. Nothing has to be trained again, so the exit code is its
    own."""

    exit_code = 4


class StoppedEarly(Exception):  # noqa: N818 - not an error
    """The run stopped on request; the message tells where its checkpoint is. Exit code `RUN_ME_AGAIN`."""


class MainProcessError(RuntimeError):
    """A function that rank 0 ran for all processes failed there; rank 0 prints the traceback. Exit code 1."""
