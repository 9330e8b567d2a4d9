"""Write all generated files, and print those that changed; `--check` writes none and fails where one would change."""

from __future__ import annotations

import sys

from docs.generator.files import GENERATORS, ROOT


def main() -> int:
    """Return 1 where `--check` finds a file that differs, otherwise 0."""
    check = "--check" in sys.argv[1:]
    files = {path: generate() for path, generate in GENERATORS.items()}
    changed = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    for path in changed:
        print(f"{path.relative_to(ROOT)}{' differs from the code' if check else ''}")
        if not check:
            path.write_text(files[path])
    return int(check and bool(changed))


sys.exit(main())
