"""Images of others and actions are named by hash, so that nobody can put something else in their place."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.deploy.scripts import DONE, FAILED, run
from tests.servers import ROOT

LOCK = ROOT / "deploy" / "images.lock"
DIGEST = r"sha256:[0-9a-f]{64}"
USES = re.compile(r"^\s*(?:- )?uses: (?P<action>\S+)(?P<comment>.*)$", re.MULTILINE)
NAMED = re.compile(
    r"(?:^\s*#?\s*-?\s*image: |^FROM (?:--platform=\S+ )?|_IMAGE[:=]-?|PYTHON_IMAGE=)[\"']?(?P<image>[^\s\"'#]+)",
    re.MULTILINE,
)
BY_VERSION = {
    "docker-compose.yml": "engines without a registry take what was loaded into them under these names; docker-compose.pinned.yml has the digests",
    "deploy/Dockerfile": "its base, for the same reason; workflows and NEXUS_PYTHON_IMAGE give it by digest",
    "tests/deploy/caddy/Dockerfile": "what stands in for an image where no registry is reachable",
}
"""Files that go on naming images by version, and why."""
DEFAULT_BASE = "python:3.13-slim-bookworm"
"""What deploy/Dockerfile is built from unless NEXUS_PYTHON_IMAGE says otherwise: by version as well, for the same reason."""
OURS = re.compile(r"(\$\{NEXUS_IMAGE_PREFIX:-nexus-\}|nexus-|ghcr\.io/\$)")
TEMPLATE = re.compile(r"\{\{|^\$\{\{|^registry:")


def locked() -> dict[str, str]:
    """Digests by image; empty: not known yet."""
    lines = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    assert lines == sorted(lines)
    found = dict(line.split(" ") for line in lines)
    assert len(found) == len(lines)
    return {image: "" if digest == "-" else digest for image, digest in found.items()}


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    files = [ROOT / name for name in listed.stdout.decode().splitlines()]
    wanted = {".yml", ".yaml"}
    return [
        one for one in files if one.is_file() and (one.suffix in wanted or one.name in {"Dockerfile", ".env.example"})
    ]


def named(path: Path) -> set[str]:
    """The images of others that a file names, a variable's default for the variable."""
    found = set()
    for match in NAMED.finditer(path.read_text()):
        image = re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", match["image"]).rstrip("}")
        if (
            ":" in image
            and "{" not in image
            and image != DEFAULT_BASE
            and not OURS.match(match["image"])
            and not TEMPLATE.search(image)
        ):
            found.add(image)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.name)
def test_actions_are_named_by_their_commit(path: Path) -> None:
    """And by their version, for people and for Dependabot; the same one everywhere."""
    found = list(USES.finditer(path.read_text()))
    assert found
    for match in found:
        assert re.fullmatch(r"[\w-]+/[\w/-]+@[0-9a-f]{40}", match["action"]), match[0]
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", match["comment"]), match[0]


def test_an_action_has_one_version() -> None:
    versions: dict[str, set[str]] = {}
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for match in USES.finditer(path.read_text()):
            versions.setdefault(match["action"].split("@")[0], set()).add(match["action"] + match["comment"])
    assert {action: found for action, found in versions.items() if len(found) > 1} == {}


def test_every_image_is_locked_and_named_by_its_digest() -> None:
    """A new image, a new version, another digest: all go through deploy/images.lock."""
    digests, seen = locked(), set()
    for path in tracked():
        name = str(path.relative_to(ROOT))
        for image in named(path):
            version, _, digest = image.partition("@")
            if name in BY_VERSION:
                assert not digest, f"{name}: {image} cannot be had without a registry"
                seen |= {version} if version in digests else set()
                continue
            assert version in digests, f"{name} names {image}, which deploy/images.lock does not have"
            assert digest == digests[version], (
                f"{name} names {image}; deploy/images.lock: {digests[version] or 'no digest'}"
            )
            seen.add(version)
    assert seen == set(digests), "images that nobody names"


def test_what_is_still_named_by_version_is_known() -> None:
    """No digest of these was found in two places that do not copy each other; `pin-images.sh` asks for them where it can."""
    assert {image for image, digest in locked().items() if not digest} == {
        "ghcr.io/invoke-ai/invokeai:v6.13.7-cpu",
        "ghcr.io/invoke-ai/invokeai:v6.13.7-cuda",
        "postgres:17.6-alpine",
        "quay.io/coreos/etcd:v3.5.34",
        "yanwk/comfyui-boot:cpu",
        "yanwk/comfyui-boot:cu128-slim",
    }


def test_the_pinned_layer_is_the_plain_one_with_digests() -> None:
    """The same servers, versions and nothing else."""
    load = YAML(typ="safe").load
    plain = load((ROOT / "docker-compose.yml").read_text())["services"]
    pinned = load((ROOT / "docker-compose.pinned.yml").read_text())["services"]
    others = {
        service for service, said in plain.items() if ":" in said.get("image", "") and "NEXUS" not in said["image"]
    }
    assert set(pinned) == others
    for service, said in pinned.items():
        assert set(said) == {"image"}
        assert said["image"].partition("@")[0] == plain[service]["image"]


def test_every_image_is_scanned() -> None:
    """Ours by their targets, others by the list that the script prints."""
    jobs = YAML(typ="safe").load((ROOT / ".github/workflows/scan.yml").read_text())["jobs"]
    assert jobs["ours"]["strategy"]["matrix"]["target"] == ["gateway", "worker", "tts", "stt"]
    said = run("pin-images.sh", "--json")
    assert json.loads(said.out) == [f"{image}@{digest}" if digest else image for image, digest in locked().items()]
    for job in ("ours", "others"):
        [scan] = [step["with"] for step in jobs[job]["steps"] if "scan-action" in step["uses"]]
        assert scan["only-fixed"] is True
        assert scan["severity-cutoff"] == "high"
        assert scan.get("fail-build", True) is True


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that the script may write."""
    copies = [
        *ROOT.glob("docker-compose*.yml"),
        LOCK,
        ROOT / ".env.example",
        ROOT / "deploy" / "compose" / "common.yml",
    ]
    copies += [*(ROOT / ".github" / "workflows").glob("*.yml"), *(ROOT / "deploy" / "kubernetes").glob("*.yaml")]
    copies += [ROOT / "deploy/kubernetes/nexus/values.yaml", ROOT / "deploy/kubernetes/nexus/ci/gpu.yaml"]
    copies += [ROOT / "deploy/service-template/Dockerfile"]
    for file in copies:
        target = tmp_path / "checkout" / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return tmp_path / "checkout"


def registry(folder: Path, says: str) -> str:
    """A PATH with a `docker buildx imagetools inspect IMAGE`, whose registry answers `says`."""
    folder.mkdir()
    (folder / "docker").write_text(f"#!/bin/sh\n{says}\n")
    (folder / "docker").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_digests_are_written_wherever_an_image_is_named(checkout: Path, tmp_path: Path) -> None:
    """The first time, and over those that were there; once more changes nothing."""
    fresh = "sha256:" + "ab" * 32
    path = registry(tmp_path / "bin", f"echo {fresh}")
    assert run("pin-images.sh", "--root", str(checkout), "--check", PATH=path).code == FAILED
    done = run("pin-images.sh", "--root", str(checkout), PATH=path)
    assert done.code == DONE, done.all
    lines = [line for line in (checkout / "deploy/images.lock").read_text().splitlines() if not line.startswith("#")]
    assert {line.split()[1] for line in lines} == {fresh}
    for name, image in {
        "docker-compose.pinned.yml": "quay.io/coreos/etcd:v3.5.34",
        "docker-compose.scale.yml": "caddy:2.11.4-alpine",
        "docker-compose.gpu.yml": "yanwk/comfyui-boot:cu128-slim",
        "deploy/compose/common.yml": "ghcr.io/invoke-ai/invokeai:v6.13.7-cpu",
        "deploy/kubernetes/etcd-secured.yaml": "quay.io/coreos/etcd:v3.5.34",
        ".github/workflows/release.yml": "python:3.13.14-slim-bookworm",
        ".env.example": "yanwk/comfyui-boot:cpu",
    }.items():
        text = (checkout / name).read_text()
        assert f"{image}@{fresh}" in text, name
        assert len(re.findall(re.escape(image) + rf"(?!@{fresh})(?=[@\s}}])", text)) == 0, name
    assert (checkout / "docker-compose.yml").read_text() == (ROOT / "docker-compose.yml").read_text()
    assert run("pin-images.sh", "--root", str(checkout), "--check", PATH=path).code == DONE


@pytest.mark.parametrize("says", ["echo 'no such host' >&2; exit 1", "echo latest"])
def test_what_a_registry_does_not_say_is_not_written(checkout: Path, tmp_path: Path, says: str) -> None:
    """Away, or talking nonsense: the files stay as they are, and the status is not 0."""
    before = {file: file.read_bytes() for file in checkout.rglob("*") if file.is_file()}
    done = run("pin-images.sh", "--root", str(checkout), PATH=registry(tmp_path / "bin", says))
    assert done.code == FAILED
    assert {file: file.read_bytes() for file in before} == before
