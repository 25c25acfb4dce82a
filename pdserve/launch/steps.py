"""What a person sees of a start: a live line a step on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

_NAME_WIDTH = 10
# Without a terminal, how often a step may report.
_PLAIN_INTERVAL_S = 5.0


@dataclass(slots=True)
class _Step:
    task: TaskID
    started_s: float
    said_s: float


class Steps:
    """Steps may overlap. Use as a context manager while something is starting; `say` works at any time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Progress(
            SpinnerColumn(),
            TextColumn(f"{{task.fields[step]:<{_NAME_WIDTH}}}", markup=False),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._steps: dict[str, _Step] = {}

    def __enter__(self) -> Steps:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def begin(self, name: str, text: str) -> None:
        now_s = time.monotonic()
        self._steps[name] = _Step(self._live.add_task(text, total=None, step=name), now_s, now_s)
        if not self._console.is_terminal:
            self.say(f"  {name:<{_NAME_WIDTH}} {text}")

    def progress(self, name: str, text: str, fraction: float | None) -> None:
        step = self._steps.get(name)
        if step is None:
            return
        # A total only once there is a fraction: until then the bar just moves.
        total = None if fraction is None else 1.0
        self._live.update(step.task, description=text, total=total, completed=fraction or 0.0)
        now_s = time.monotonic()
        if not self._console.is_terminal and now_s - step.said_s >= _PLAIN_INTERVAL_S:
            step.said_s = now_s
            self.say(f"  {name:<{_NAME_WIDTH}} {text}" + ("" if fraction is None else f" {fraction:.0%}"))

    def done(self, name: str, result: str) -> None:
        self._end(name, result, mark="✓", style="green")

    def failed(self, name: str, reason: str) -> None:
        self._end(name, reason, mark="✗", style="red")

    def _end(self, name: str, text: str, *, mark: str, style: str) -> None:
        step = self._steps.pop(name, None)
        if step is None:
            return
        self._live.remove_task(step.task)
        took = f"  {time.monotonic() - step.started_s:.1f} s"
        self._print(Text.assemble((mark, style), f" {name:<{_NAME_WIDTH}} {text}", (took, "dim")))

    def say(self, text: str, style: str = "") -> None:
        self._print(Text(text, style))

    def _print(self, text: Text) -> None:
        """Lines are never cut, so that a command can be copied."""
        self._console.print(text, soft_wrap=True)
