"""Helm, in a process of its own: the library brings Go's runtime, with its threads and signals.

Standard input: a JSON list of [values, release's name, namespace]. Standard output: for each `{"files": {path: text}}` or
`{"error": text}`, and what the linter says.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import helm_python


def main() -> None:
    path, cases = sys.argv[1], json.load(sys.stdin)
    answers: list[dict[str, Any]] = []
    with helm_python.Chart.load(path) as chart:
        for values, name, namespace in cases:
            try:
                answers.append({"files": chart.render(values, name=name, namespace=namespace)})
            except helm_python.HelmError as error:
                answers.append({"error": str(error)})
    json.dump({"answers": answers, "lint": helm_python.lint(path)}, sys.stdout)


if __name__ == "__main__":
    main()
