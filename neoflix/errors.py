"""What the user got wrong, told apart from what this project got wrong. A leaf: imports nothing of ours."""


class UserError(ValueError):
    """A mistake of the user's, in one sentence: what is wrong, where, and the way out.

    A program that ends by it prints the sentence and exits with code 2, without a traceback. Any other exception is a
    bug, of ours or of a library, and keeps its traceback.
    """

    exit_code = 2


class DivergedError(UserError):
    """Training whose losses or weights are no longer finite numbers. The input was valid: exit code 1."""

    exit_code = 1
