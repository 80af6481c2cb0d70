"""Where a running experiment says how far it is."""

import signal
import threading
from types import FrameType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressBar:
    """A bar with the remaining time on a terminal; elsewhere only what is said.

    While it is entered, Ctrl-C raises KeyboardInterrupt from the next report, and only a second Ctrl-C raises it
    wherever the program is. Python's own handler may raise inside a callback of JAX, where the exception is dropped and
    the run goes on, or while XLA works, which can crash.
    """

    def __init__(self, console: Console):
        """Draws on the console once it is entered."""
        self._progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            # A narrow window of speed would swing between compilation and training.
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=30,
        )
        self._console = console
        self._interrupted = False
        self._previous_handler: Any = None
        self._task = self._progress.add_task("starting", total=None)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._previous_handler = signal.signal(signal.SIGINT, self._defer_interrupt)
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._console.is_terminal:  # stop() prints an empty line elsewhere
            self._progress.stop()
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)

    def start(self, work: float) -> None:
        """Announces the total work, in gradient evaluations, steps or runs."""
        self._progress.update(self._task, total=work)

    def phase(self, description: str) -> None:
        """Says what is being done now."""
        self._check_interrupt()
        self._progress.update(self._task, description=description)

    def advance(self, work: float) -> None:
        """Says that this much more of the work is done."""
        self._check_interrupt()
        self._progress.advance(self._task, work)

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def _defer_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        self._progress.update(self._task, description="stopping")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _check_interrupt(self) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
