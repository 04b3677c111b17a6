"""What every command in tools/ and launch/ shares: how it ends."""

import atexit
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import megaslm.launchers  # noqa: F401  # remembers who started this process
from megaslm.errors import USER_ERROR_EXIT_CODE, UserError
from megaslm.signals import ENDING_SIGNALS

INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE_EXIT_CODE = 141  # 128 + SIGPIPE

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)

# The launcher ends all ranks when the first is gone: a rank that has nothing to say lets the other one speak.
SECONDS_FOR_THE_MESSAGE = 1.0


def mute_native_exit() -> None:
    """At the very end of this process, let nothing write to stderr but Python's own exit handlers.

    Every torch optimizer imports triton where it is installed, and triton 3.9's bindings then list the objects they
    leaked, some sixty lines, while the interpreter is taken down. To be called before torch is imported: exit handlers
    run in the opposite order.
    """

    def mute() -> None:
        if "triton" in sys.modules:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    atexit.register(mute)


def interrupt_on_termination() -> None:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does: through every `finally` and `with`, so that temporary
    folders go. A signal that is ignored, as under nohup, stays ignored."""

    def interrupt(*_) -> NoReturn:
        raise KeyboardInterrupt

    handle_termination(interrupt)


def handle_termination(handler) -> None:
    """Of Ctrl-C, of a batch system and of a terminal that is closed; what is ignored stays so."""
    for number in ENDING_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and leave with its return value as the exit code (None: 0).

    A UserError becomes one `error: ...` message on stderr and exit code 2, and so does a full disk, be it only that of
    stdout; Ctrl-C exit code 130, a closed pipe 141; any other exception is a fault of ours and keeps its traceback. Of
    several ranks with the same error one on each machine prints it.
    """
    mute_native_exit()
    if hasattr(sys.stdout, "reconfigure"):  # not where a test has put something in its place
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file need not be UTF-8
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        if error.on_one_rank or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(SECONDS_FOR_THE_MESSAGE)
        code = USER_ERROR_EXIT_CODE
        if error.on_one_rank:
            # The others wait in a collective: taking the process groups down in good order would wait for them.
            sys.stdout.flush()
            os._exit(code)
    except BrokenPipeError:
        _drop_output()  # `| head` has seen enough
        code = BROKEN_PIPE_EXIT_CODE
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        _drop_output()
        print(f"error: {error.strerror}: make room on the disk, or write elsewhere", file=sys.stderr)
        code = USER_ERROR_EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED_EXIT_CODE
    sys.exit(code)


def _drop_output() -> None:
    """What Python still holds back for stdout must not raise once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
