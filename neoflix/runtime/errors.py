"""Exceptions and exit codes that have a meaning of their own. A leaf: imports nothing of ours."""

RUN_ME_AGAIN = 75  # exit code: stopped on request, the same command goes on from there (EX_TEMPFAIL of sysexits.h)


class UserError(ValueError):
    """A mistake of the user's, in one sentence: what is wrong, where, and the way out.

    A program that ends by it prints the sentence and exits with code 2, without a traceback. Any other exception is a
    bug, of ours or of a library, and keeps its traceback.
    """

    exit_code = 2


class DivergedError(UserError):
    """Training whose losses or weights are no longer finite numbers. The input was valid: exit code 1."""

    exit_code = 1


class StoppedEarly(Exception):  # noqa: N818 - not an error
    """The run stopped on request, with its checkpoint saved; says where. Exit code `RUN_ME_AGAIN`."""


class MainProcessError(RuntimeError):
    """What rank 0 did for all processes failed there; rank 0 shows the traceback. Exit code 1."""
