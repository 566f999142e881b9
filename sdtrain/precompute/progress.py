"""The progress bar of what is computed in advance: how many are done, how many a second, and the
time left.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class RateColumn(ProgressColumn):
    """Shows how many a second, such as "12.3 pictures/s"."""

    def __init__(self, noun: str) -> None:
        super().__init__()
        self.noun = noun

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g} {self.noun}/s")


@dataclass(frozen=True)
class Bar:
    """A task of a progress bar."""

    progress: Progress
    task: TaskID
    total: int

    def advance(self, count: int) -> None:
        """Count more that are done."""
        self.progress.advance(self.task, count)

    def wait(self, check_signals: Callable[[], None]) -> Callable[[int], None]:
        """Return a function that takes how many other processes have left, and checks signals."""

        def waiting(left: int) -> None:
            self.progress.update(self.task, completed=self.total - left)
            check_signals()

        return waiting


@contextmanager
def progress_bar(console: Console, total: int, noun: str, verb: str = "encoding") -> Iterator[Bar]:
    """Show a bar while the block runs. noun: what is counted. verb: what is done."""
    columns = [
        TextColumn(f"  {verb}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(noun),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, progress.add_task("", total=total), total)
