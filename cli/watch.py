"""`nexus watch`: a job as it goes, and what comes of it."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from cli import options
from cli.gateway_client import ApiClient
from cli.job_follower import ENDS, FollowedJobEvent, JobFollower
from cli.job_output import fetch_result, report, text_of

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Where the result goes. Default: pictures and sound into JOB.EXT, text is printed."
    ),
]
NAMES = {"load": "loading the model", "queued": "waiting within the backend", "run": "running"}
INTERRUPTED_EXIT_CODE = 130


def watch(
    job: Annotated[str, typer.Argument(help="The job's id.")],
    output: Output = None,
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """Follow a job to its end: tokens as they come, progress, the result. Ends with 1 where there is none.

    Standard output has the result alone. With --json it has one line an event, and a last one with the result.
    """
    with options.client(url, key, data_dir, key_file) as api:
        raise typer.Exit(follow(api, job, output=output, as_json=as_json))


def follow(api: ApiClient, job: str, *, output: Path | None = None, as_json: bool = False) -> int:
    """Show the job until it ends; the exit code. Ctrl-C ends the watching alone."""
    try:
        return _follow_as_json(api, job, output) if as_json else _follow(api, job, output)
    except KeyboardInterrupt:
        print(f"\nwatching stopped, the job goes on. To watch it again: nexus watch {job}", file=sys.stderr)
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
    # A pipe gets the text at the end: what was written there could not be taken back when an attempt fails.
    viewer = JobViewer(live_text=sys.stdout.isatty() and output is None)
    follower = JobFollower(api, job, viewer.note)
    try:
        for found in follower.queued(follower.look()):
            viewer.waiting(found)
        with closing(follower.events()) as events:
            for event in events:
                viewer.see(event)
    finally:
        viewer.close()
    if viewer.end != "completed":
        return 1
    report(fetch_result(api, job, output, show=not viewer.said_all).files)
    return 0


class JobViewer:
    """Shows a job to a person: its text on standard output, all else on standard error."""

    def __init__(self, *, live_text: bool, out: TextIO | None = None) -> None:
        from rich.console import Console

        self.end = ""
        """How the job ended."""
        self.said_all = False
        """The whole answer stands on standard output."""
        self._live_text = live_text
        self._out = out or sys.stdout
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._shown = ""
        self._mid_line = False
        self._said = False
        """Something of the newest attempt stands on standard output."""

    def waiting(self, job: dict[str, Any]) -> None:
        """It is queued."""
        position, eta = job.get("queue_position"), job.get("eta_seconds")
        text = "queued" if position is None else f"queued, {position} before it"
        self._show(text + (f", about {_duration(eta)} to go" if eta is not None else ""))

    def see(self, event: FollowedJobEvent) -> None:
        """One event."""
        data = event.data if isinstance(event.data, dict) else {}
        if event.kind in ENDS:
            self._ended(event, data)
        elif event.kind == "chunk":
            self._say(text_of(data))
        elif event.kind == "progress":
            self._advance(data)
        elif event.kind == "restarted":
            self._restarted(str(data.get("worker") or "a worker"))
        elif event.kind == "started":
            self._show(f"running on {data['worker']}" if data.get("worker") else "running")
        elif not self._shown.startswith(event.kind):  # where it waits says more than that it does
            self._show(event.kind)

    def note(self, text: str) -> None:
        """A line that stays."""
        self._end_line()
        if self._progress is not None:
            self._progress.console.print(text, markup=False)
        else:
            self._console.print(text, markup=False)

    def close(self) -> None:
        """Nothing more is shown."""
        if self._progress is not None:
            progress, self._progress = self._progress, None
            progress.stop()
        self._end_line()

    def _ended(self, event: FollowedJobEvent, data: dict[str, Any]) -> None:
        self.end = event.kind
        self.said_all = self._said and bool(event.id)  # without an id, events were missing before it
        self.close()
        if event.kind != "completed":
            error = data.get("error") or {}
            self.note(f"{event.kind}: {error['message']}" if error.get("message") else event.kind)

    def _say(self, text: str) -> None:
        if not text:
            return
        if self._live_text:
            if not self._mid_line:
                self.close()
            self._mid_line = self._said = True
            self._out.write(text)
            self._out.flush()
        else:
            self._show("answering")

    def _restarted(self, worker: str) -> None:
        void, self._said = self._said, False
        self.close()
        self.note(f"begun anew, on {worker}" + (": what stands above is void" if void else ""))
        self._shown = ""

    def _advance(self, data: dict[str, Any]) -> None:
        text = data.get("message") or NAMES.get(str(data.get("phase")), "running")
        if data.get("steps"):
            text = f"{text} {data.get('step') or 0}/{data['steps']}"
        self._show(str(text), data.get("fraction"))

    def _show(self, text: str, fraction: float | None = None) -> None:
        """On a terminal one line that changes, elsewhere a line for each change that is worth one."""
        if self._mid_line:
            return
        if not self._console.is_terminal:
            # Ten lines of progress are enough for a log.
            line = text if fraction is None else f"{text.partition(' ')[0]} {int(fraction * 10) * 10} %"
            if line != self._shown:
                self._shown = line
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
