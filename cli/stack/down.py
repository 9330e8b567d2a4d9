"""`nexus down`: stop the stack that `nexus up` runs on the data directory."""

from __future__ import annotations

import signal
import sys
import time

import typer

from cli import options
from cli.errors import INTERRUPTED_EXIT_CODE, ConsoleError
from cli.stack.data_dir import DataDir, data_dir_from
from cli.stack.process_identity import process_identity, send_signal

SIGNAL_TIMEOUT_S = 15.0
"""Time to end after each signal. A stack ends itself within 5 s; a busy machine takes longer."""
EXIT_TIMEOUT_S = 1.0
"""Time for the process itself to exit once it has released the lock."""
HOLDER_TIMEOUT_S = 1.0
"""Time for a starting stack to write its pid into the lock file."""
POLL_INTERVAL_S = 0.05


def down(data_dir: options.Data = None) -> None:
    """Stop the Nexus that runs on the data directory, and wait for its end.

    Exit code 0 also if none runs.
    """
    data = data_dir_from(data_dir)
    if not data.is_held():
        print(f"No Nexus runs on {data.root}.")
        return
    holder = data.holder()
    pid = holder.pid
    print(f"Stopping the Nexus on {data.root} (pid {pid})…", flush=True)
    try:
        ended = _stop(data)
    except KeyboardInterrupt:
        raise ConsoleError(f"Interrupted. Pid {pid} is still stopping.", exit_code=INTERRUPTED_EXIT_CODE) from None
    if not ended:
        raise ConsoleError(
            f"Pid {pid} does not end, even after SIGKILL: it hangs in the kernel, or processes of the stack are left."
        )
    print("Stopped.")
    raise typer.Exit(0)


def _stop(data: DataDir) -> bool:
    """Send SIGTERM, then SIGKILL. Returns whether the stack and its processes have ended."""
    holder = data.holder()
    for number in (signal.SIGTERM, signal.SIGKILL):
        if number is signal.SIGKILL:
            print("It does not stop; killing it.", file=sys.stderr)
        _signal_holder(data, number)
        deadline = time.monotonic() + SIGNAL_TIMEOUT_S
        while time.monotonic() < deadline:
            if not data.is_held():
                deadline = time.monotonic() + EXIT_TIMEOUT_S
                while process_identity(holder.pid) == holder.identity != "" and time.monotonic() < deadline:
                    time.sleep(POLL_INTERVAL_S)
                return data.wait_for_children()
            time.sleep(POLL_INTERVAL_S)
    return False


def _signal_holder(data: DataDir, number: signal.Signals) -> None:
    """Signal the process that holds the lock. Raises ConsoleError if the lock file names another process."""
    deadline = time.monotonic() + HOLDER_TIMEOUT_S
    while data.is_held():
        holder = data.holder()
        if send_signal(holder.pid, holder.identity, number):
            send_signal(holder.pid, holder.identity, signal.SIGCONT)
            return
        if time.monotonic() > deadline:
            if process_identity(holder.pid) == holder.identity != "":
                raise ConsoleError(
                    f"Pid {holder.pid}, which runs on {data.root}, belongs to another user. Stop it as that user."
                )
            raise ConsoleError(
                f"{data.lock_file} is locked by a process that is not pid {holder.pid}. "
                f"Find it with `fuser {data.lock_file}`, and stop it."
            )
        time.sleep(POLL_INTERVAL_S)
