"""Entry point of the `nexus` command."""

from __future__ import annotations

import sys

from cli.errors import INTERRUPTED_EXIT_CODE, ConsoleError


def main() -> None:
    """Run the command line. A ConsoleError ends it with a message and an exit code, without a traceback."""
    if sys.argv[1:] == ["--version"]:  # without the parser, whose import takes a tenth of a second
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
        sys.exit(INTERRUPTED_EXIT_CODE)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        # Pydantic makes a SchemaError of an interrupt that comes while it builds a model, during the imports.
        if "KeyboardInterrupt" not in str(error):
            raise
        sys.exit(INTERRUPTED_EXIT_CODE)


if __name__ == "__main__":
    main()
