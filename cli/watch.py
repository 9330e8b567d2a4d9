"""`nexus watch`: follow a job to its end, and show or save its result."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from cli import options
from cli.errors import INTERRUPTED_EXIT_CODE
from cli.gateway_client import ApiClient
from cli.job_follower import ENDS, FollowedJobEvent, JobFollower
from cli.job_output import fetch_result, report, text_of

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="File for the result. Default: images and audio go to JOB.EXT, text is printed."
    ),
]
PHASES = {"load": "loading the model", "queued": "waiting within the backend", "run": "running"}


@options.gateway_command
def watch(api: ApiClient, job: options.JobId, output: Output = None, *, as_json: options.Json = False) -> None:
    """Follow a job to its end: tokens as they arrive, progress, the result.

    Standard output gets the result alone. With --json it gets a line for each event, and a last one with the result.
    Exit code 1 if the job ends without a result.
    """
    raise typer.Exit(follow(api, job, output=output, as_json=as_json))


def follow(api: ApiClient, job: str, *, output: Path | None = None, as_json: bool = False) -> int:
    """Show a job until it ends. Ctrl-C stops the watching, not the job. Returns the exit code."""
    try:
        return _follow_as_json(api, job, output) if as_json else _follow(api, job, output)
    except KeyboardInterrupt:
        print(f"\nStopped watching; the job continues. To watch it again: nexus watch {job}", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE


def _follow_as_json(api: ApiClient, job: str, output: Path | None) -> int:
    kind = ""
    follower = JobFollower(api, job, lambda text: print(text, file=sys.stderr))
    with closing(follower.events()) as events:
        for event in events:
            kind = event.kind
            print(json.dumps({"id": event.id, "event": f"job.{kind}", "data": event.data}), flush=True)
    if kind != "completed":
        return 1
    result = fetch_result(api, job, output, show=False)
    line = {"files": [str(file) for file in result.files]} if result.files else {"data": result.value}
    print(json.dumps({"event": "result", **line}))
    return 0


def _follow(api: ApiClient, job: str, output: Path | None) -> int:
    # A pipe gets the text at the end: tokens of a failed attempt could not be taken back.
    viewer = JobViewer(live_text=sys.stdout.isatty() and output is None)
    show_events(api, job, viewer)
    if viewer.end != "completed":
        return 1
    report(fetch_result(api, job, output, show=not viewer.is_complete).files)
    return 0


def show_events(api: ApiClient, job: str, viewer: JobViewer) -> None:
    """Show a job's queue position and events until it ends."""
    follower = JobFollower(api, job, viewer.note)
    try:
        for queued in follower.queued(follower.fetch()):
            viewer.show_queued(queued)
        with closing(follower.events()) as events:
            for event in events:
                viewer.show_event(event)
    finally:
        viewer.close()


class JobViewer:
    """Shows a job on a terminal: its text on standard output, everything else on standard error."""

    def __init__(self, *, live_text: bool, out: TextIO | None = None) -> None:
        from rich.console import Console

        self.end = ""
        """The status with which the job ended."""
        self.is_complete = False
        """Whether the whole answer is on standard output."""
        self._live_text = live_text
        self._out = out or sys.stdout
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._status_line = ""
        self._mid_line = False
        self._has_text = False
        """Whether standard output holds text of the newest attempt."""

    def show_queued(self, job: dict[str, Any]) -> None:
        """Show the position and the estimated wait of a queued job."""
        position, eta = job.get("queue_position"), job.get("eta_seconds")
        text = "queued" if position is None else f"queued, {position} before it"
        self._show(text + (f", about {_duration(eta)} to go" if eta is not None else ""))

    def show_event(self, event: FollowedJobEvent) -> None:
        """Show one event."""
        data = event.data if isinstance(event.data, dict) else {}
        if event.kind in ENDS:
            self._ended(event, data)
        elif event.kind == "chunk":
            self._write(text_of(data))
        elif event.kind == "progress":
            self._advance(data)
        elif event.kind == "restarted":
            self._restarted(str(data.get("worker") or "a worker"))
        elif event.kind == "started":
            self._show(f"running on {data['worker']}" if data.get("worker") else "running")
        elif not self._status_line.startswith(event.kind):  # a queue position says more than the bare status
            self._show(event.kind)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._end_line()
        if self._progress is not None:
            self._progress.console.print(text, markup=False)
        else:
            self._console.print(text, markup=False)

    def close(self) -> None:
        """End the progress bar and the current line."""
        if self._progress is not None:
            progress, self._progress = self._progress, None
            progress.stop()
        self._end_line()

    def _ended(self, event: FollowedJobEvent, data: dict[str, Any]) -> None:
        self.end = event.kind
        self.is_complete = self._has_text and bool(event.id)  # without an id, earlier events have expired
        self.close()
        if event.kind != "completed":
            error = data.get("error") or {}
            self.note(f"{event.kind}: {error['message']}" if error.get("message") else event.kind)

    def _write(self, text: str) -> None:
        if not text:
            return
        if self._live_text:
            if not self._mid_line:
                self.close()
            self._mid_line = self._has_text = True
            self._out.write(text)
            self._out.flush()
        else:
            self._show("answering")

    def _restarted(self, worker: str) -> None:
        was_shown, self._has_text = self._has_text, False
        self.close()
        self.note(f"restarted on {worker}" + (": the text above is void" if was_shown else ""))
        self._status_line = ""

    def _advance(self, data: dict[str, Any]) -> None:
        text = data.get("message") or PHASES.get(str(data.get("phase")), "running")
        if data.get("steps"):
            text = f"{text} {data.get('step') or 0}/{data['steps']}"
        self._show(str(text), data.get("fraction"))

    def _show(self, text: str, fraction: float | None = None) -> None:
        """Show the state: on a terminal in one line that changes, elsewhere in a line for each change."""
        if self._mid_line:
            return
        if not self._console.is_terminal:
            # a log gets at most ten lines of progress
            line = text if fraction is None else f"{text.partition(' ')[0]} {int(fraction * 10) * 10} %"
            if line != self._status_line:
                self._status_line = line
                self._console.print(line, markup=False)
            return
        if self._progress is None or self._task is None:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[percent]}"),
            )
            self._progress = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
            self._task = self._progress.add_task(text, total=None, percent="")
            self._progress.start()
        percent = "" if fraction is None else f"{fraction:.0%}"
        total = None if fraction is None else 1.0
        self._progress.update(self._task, description=text, total=total, completed=fraction or 0.0, percent=percent)

    def _end_line(self) -> None:
        if self._mid_line:
            self._mid_line = False
            self._out.write("\n")
            self._out.flush()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
