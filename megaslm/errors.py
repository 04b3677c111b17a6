"""The one exception for what a user can mend. Commands print its text and leave with exit code 2."""

USER_ERROR_EXIT_CODE = 2


def first_line(error: BaseException, otherwise: str = "no message") -> str:
    """The first line of an error's message; `otherwise` where it has none."""
    return next(iter(str(error).strip().splitlines()), otherwise)


class UserError(Exception):
    """A mistake in a command, a configuration, the data or the machine: says what, where and what to do.

    Everything else (`AssertionError`, `RuntimeError`, ...) is a fault of ours and keeps its traceback.
    Several ranks raise the same error together; `on_one_rank` marks one that may have come up on a single rank (out of
    memory, a lost connection), which then prints it itself and leaves at once.
    """

    def __init__(self, message: str, on_one_rank: bool = False):
        super().__init__(message)
        self.on_one_rank = on_one_rank
