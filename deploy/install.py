"""Run one step of the installation for the Makefile: what is going on, and a plain sentence where it fails.

    python deploy/install.py --step "3 of 3" --mb 460 "local models" -- uv sync …

The installer's own progress is shown on a terminal: one bar for each large file, and how many packages are left. Elsewhere there is a line
for each large file. Whatever is stopped or fails goes on where it stopped when it is run again: installed packages and
finished downloads stay. Standard library alone, since nothing is installed yet.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

UNPACKED = 3
"""Space that a download needs, as a multiple of its size: itself in the cache, unpacked there, and in .venv."""
ANSWER_TIMEOUT_S = 10
FILES_URL = "https://files.pythonhosted.org/"
"""Where uv.lock has the packages from."""
AGAIN = "Run the same command again: it goes on where it stopped."
INTERRUPTED = 130


def main() -> int:
    """Install, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mb", type=int, required=True, help="megabytes to download, at most")
    parser.add_argument("--index", default=FILES_URL, help="where the packages come from")
    parser.add_argument("--step", default="", help="which one of how many this is")
    parser.add_argument("what", help="what is installed, for the line that says so")
    parser.add_argument("command", nargs="+", help="the installer and its arguments, behind --")
    given = parser.parse_args()
    step = f"step {given.step}, " if given.step else ""
    say(f"==> Installing {given.what} ({step}up to {given.mb} MB to download)")
    places = [Path(sys.prefix), cache_folder()]
    if tight := tight_space(places, given.mb):
        say(f"    note: {tight}")
    began = time.monotonic()
    try:
        code = run(given.command)
    except KeyboardInterrupt:
        say(f"\nStopped. {AGAIN}")
        return INTERRUPTED
    if code:
        say(f"\nInstalling {given.what} failed: {why(places, given.index, given.mb)}\n{AGAIN}")
        return code
    say(f"    done in {time.monotonic() - began:.0f} s")
    return 0


def say(text: str) -> None:
    """Write a line at once, whether anybody reads it or not."""
    print(text, file=sys.stderr, flush=True)


def run(command: list[str]) -> int:
    """Run the installer. On a terminal it draws bars; elsewhere the list of every package is left out."""
    if sys.stderr.isatty():
        return subprocess.call(command)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if not line.startswith((" + ", " - ", " ~ ")):
                say("    " + line.rstrip())
    return process.returncode


def cache_folder() -> Path:
    """Return where uv keeps what it downloads."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uv"
    return Path(os.environ.get("UV_CACHE_DIR") or default)


def free_bytes(folder: Path) -> int:
    """Return the free space for this folder, which may not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def tight_space(places: list[Path], mb: int) -> str:
    """Return what to say where a first installation may not fit; empty: it does. What is cached already needs less."""
    tightest = min(places, key=free_bytes)
    free, needed = free_bytes(tightest) // 1_000_000, mb * UNPACKED
    if free >= needed:
        return ""
    return f"{free} MB are free for {tightest}, and up to {needed} MB are needed. UV_CACHE_DIR names another place for downloads."


def why(places: list[Path], index: str, mb: int) -> str:
    """Return the likeliest cause of a failure."""
    if unwritable := [place for place in places if place.exists() and not os.access(place, os.W_OK)]:
        return f"{unwritable[0]} cannot be written: it belongs to another user."
    if refusal := unreachable(index):
        return (
            f"{urlsplit(index).hostname} cannot be reached ({refusal}).\n"
            "Check the network. Behind a proxy set HTTPS_PROXY; where certificates are a company's own, SSL_CERT_FILE."
        )
    if tight := tight_space(places, mb):
        return f"the disk is full, or nearly so. {tight}"
    return "the installer's own words are above."


def unreachable(url: str) -> str:
    """Return why nothing answers at the URL; empty: something does, whatever it says."""
    try:
        with urlopen(Request(url, method="HEAD"), timeout=ANSWER_TIMEOUT_S):  # noqa: S310
            return ""
    except HTTPError:
        return ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


if __name__ == "__main__":
    sys.exit(main())
