"""Rendering the Helm chart, and looking into what comes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import yaml

from tests.cluster import ROOT

CHART = ROOT / "deploy" / "kubernetes" / "nexus"
NAME, NAMESPACE = "nexus", "ai"
Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rendered:
    """What one set of values makes of the chart."""

    objects: list[Object]
    notes: str

    def of(self, kind: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] == kind]

    def one(self, kind: str, name: str) -> Object:
        [found] = [each for each in self.of(kind) if each["metadata"]["name"] == name]
        return found


class Refused(Exception):
    """Helm does not take these values."""


def _need_helm() -> None:
    if find_spec("helm_python") is None:
        reason = "no Helm for this machine on PyPI: the dependency group `charts` needs Linux on x86-64"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def _run(cases: list[Any]) -> dict[str, Any]:
    _need_helm()
    command = [sys.executable, "-m", "tests.deploy.render", str(CHART)]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def lint() -> list[str]:
    """What Helm's linter finds, above information."""
    found = _run([])["lint"]
    return [*found["errors"], *(each["error"] for each in found["messages"] if each["severity"] > 1)]


def render(*many: Object, namespace: str = NAMESPACE) -> list[Rendered | Refused]:
    """The chart with each of these values; one process for all of them."""
    answers = _run([[values, NAME, namespace] for values in many])["answers"]
    return [Refused(answer["error"]) if "error" in answer else _parsed(answer["files"]) for answer in answers]


def _parsed(files: dict[str, str]) -> Rendered:
    notes = "".join(text for path, text in files.items() if path.endswith("NOTES.txt"))
    texts = [text for path, text in sorted(files.items()) if not path.endswith("NOTES.txt")]
    return Rendered([each for text in texts for each in yaml.safe_load_all(text) if each], notes)


@cache
def examples() -> dict[str, Rendered]:
    """The chart as it comes, and with every file of values in `ci/`."""
    values = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CHART.glob("ci/*.yaml"))}
    rendered = render({}, *values.values())
    out = dict(zip(["defaults", *values], rendered, strict=True))
    for name, each in out.items():
        assert isinstance(each, Rendered), f"{name}: {each}"
    return out  # type: ignore[return-value]


EXAMPLES = ["defaults", *sorted(path.stem for path in CHART.glob("ci/*.yaml"))]


def pods(rendered: Rendered) -> Iterator[tuple[str, Object]]:
    """Each pod's name and template: labels and spec."""
    for each in rendered.objects:
        if each["kind"] in {"Deployment", "StatefulSet"}:
            yield each["metadata"]["name"], each["spec"]["template"]
        elif each["kind"] == "Pod":
            yield each["metadata"]["name"], each


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """As Kubernetes matches labels."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    return all(labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", []))


def environment(container: Object) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container.get("env", [])}
