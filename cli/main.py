"""The `nexus` command."""

from __future__ import annotations

import sys

from cli.errors import ConsoleError


def main() -> None:
    """Run the command line. A ConsoleError is a message and an exit code, never a traceback."""
    if sys.argv[1:] == ["--version"]:  # without the parser, which takes a tenth of a second to import
        from backbone.version import VERSION

        print(f"nexus {VERSION}")
        return
    try:
        from cli.app import app

        app()
    except ConsoleError as error:
        print(f"nexus: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    main()
