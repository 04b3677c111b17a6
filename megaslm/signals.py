"""Parts of a program in which a signal that ends it would do harm."""

import contextlib
import signal
import threading
from collections.abc import Iterator

ENDING_SIGNALS = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}
"""Ctrl-C, a batch system's, and a closed terminal's; not every system has all of them."""


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Signals that end this process come when the block has ended, and never to a process that it starts.

    The mask is for those, which inherit it. This process may have threads that still take a signal: then Python calls
    the handler in the main thread all the same, so that there has to be one that waits.
    """
    masks = hasattr(signal, "pthread_sigmask")
    if masks:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    handlers, came = {}, []
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
        handlers = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for number in handlers:
            signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if came:
            signal.raise_signal(came[0])
