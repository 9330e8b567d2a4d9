"""`nexus down`: stop the stack that `nexus up` runs on the data directory, in whatever terminal or none."""

from __future__ import annotations

import signal
import sys
import time

import typer

from cli import options
from cli.errors import ConsoleError
from cli.stack.data_dir import DataDir, data_dir_from
from cli.stack.process_identity import process_identity, send_signal

PATIENCE_S = 15.0
"""A stack ends within 5 s, by force where need be; on a busy machine it gets more."""
LAST_S = 1.0
"""For so long at most, the end of the process itself is waited for once everything of it has ended."""
LOOK_S = 0.05


def down(data_dir: options.Data = None) -> None:
    """Stop the Nexus that runs on the data directory, and wait for its end. Exit code 0 also where none runs."""
    data = data_dir_from(data_dir)
    if not data.is_held():
        print(f"No Nexus runs on {data.root}.")
        return
    holder = data.holder()
    pid = holder.pid
    print(f"Stopping the Nexus on {data.root} (pid {pid})…", flush=True)
    try:
        ended = _end(data)
    except KeyboardInterrupt:
        raise ConsoleError(f"not waiting any longer; pid {pid} is still stopping", exit_code=130) from None
    if not ended:
        raise ConsoleError(f"the process with pid {pid} does not end; it is another user's, or hangs in the kernel")
    print("Stopped.")
    raise typer.Exit(0)


def _end(data: DataDir) -> bool:
    """Ask, and force it where that takes too long. Returns whether nothing of it is left."""
    holder = data.holder()
    for number in (signal.SIGTERM, signal.SIGKILL):
        if number is signal.SIGKILL:
            print("It does not end in order; killing it.", file=sys.stderr)
        _signal_holder(data, number)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if not data.is_held():
                last = time.monotonic() + LAST_S
                while process_identity(holder.pid) == holder.identity != "" and time.monotonic() < last:
                    time.sleep(LOOK_S)
                return data.wait_for_children()
            time.sleep(LOOK_S)
    return False


def _signal_holder(data: DataDir, number: signal.Signals) -> None:
    """Signal the process that holds the lock; nobody where what the lock's file says is a former one's."""
    deadline = time.monotonic() + 1.0  # it writes down who it is a moment after it has the lock
    while data.is_held():
        holder = data.holder()
        if send_signal(holder.pid, holder.identity, number):
            send_signal(holder.pid, holder.identity, signal.SIGCONT)
            return
        if time.monotonic() > deadline:
            if process_identity(holder.pid) == holder.identity != "":
                raise ConsoleError(f"pid {holder.pid}, which runs on {data.root}, is another user's: it can stop it")
            raise ConsoleError(
                f"something holds {data.lock_file}, and it is not pid {holder.pid} any more: "
                f"find it with `fuser {data.lock_file}`, and stop it"
            )
        time.sleep(LOOK_S)
