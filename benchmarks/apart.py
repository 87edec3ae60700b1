"""Work in a process of its own, which is ended when its time is over: what fails or hangs does not stop the rest."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection


def in_child(work: Callable[[float], Iterator[str]], end: float, sender: Connection) -> None:
    """Send the lines, then None; in a process group of its own, which compilers that it starts belong to as well."""
    os.setsid()
    for line in work(end):
        sender.send(line)
    sender.send(None)


def lines_of(work: Callable[[float], Iterator[str]], seconds: float, method: str) -> Iterator[str]:
    """The lines of ``work``, as they come, and what became of it if it did not end well.

    Args:
        work: Gets the time at which it will be ended, by ``time.monotonic()``.
        seconds: How long it may take.
        method: ``fork``, which finds imported what is, or ``spawn``.
    """
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    end = time.monotonic() + seconds
    process = context.Process(target=in_child, args=(work, end, sender))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            line = receiver.recv()
            if line is None:
                process.join(5)  # what is left to do at its end may hang as well
                return
            yield line
        yield f"\nstopped after {seconds:.0f} s"
    except EOFError:
        process.join()
        yield f"\nfailed: status {process.exitcode}; its last words are on the terminal"
    finally:
        for kill in (process.kill, lambda: os.killpg(process.pid, signal.SIGKILL)):
            with suppress(ProcessLookupError):
                kill()
        process.join()
