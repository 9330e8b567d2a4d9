"""The ComfyUI adapter on a real ComfyUI. Skipped unless `NEXUS_COMFYUI_DIR` names its source and `NEXUS_COMFYUI_PYTHON` a Python for it.

Without a GPU and without a model, from nothing (torch, torchvision and torchaudio must all be the CPU builds):

    git clone --depth 1 https://github.com/comfyanonymous/ComfyUI /tmp/comfyui
    python3.11 -m venv /tmp/comfyui/venv
    /tmp/comfyui/venv/bin/pip install torch torchvision torchaudio --index-url https://download.pytorch.org/whl/cpu
    /tmp/comfyui/venv/bin/pip install -r /tmp/comfyui/requirements.txt
    NEXUS_COMFYUI_DIR=/tmp/comfyui NEXUS_COMFYUI_PYTHON=/tmp/comfyui/venv/bin/python make test ARGS="tests/slow/test_comfyui_real.py"

What samplers do is done by a node of our own, which takes its time step by step.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.embedded.managed_process import bind_to_parent
from schemas.jobs import Capability
from tests.backends.adapter_contract import AdapterContract, AdapterRig, outputs_of
from tests.backends.image_tasks import answer_of, events_of, file_of, image_of, image_task, picture_bytes
from workers.backends.base import BackendConfig, BackendError, BackendRefused, Chunk, Finish
from workers.backends.comfyui.adapter import ComfyUIBackend

SOURCE = os.environ.get("NEXUS_COMFYUI_DIR", "")
PYTHON = os.environ.get("NEXUS_COMFYUI_PYTHON", "python3")
pytestmark = [pytest.mark.skipif(not SOURCE, reason="NEXUS_COMFYUI_DIR names no ComfyUI"), pytest.mark.timeout(300)]

NODE = """
import time, comfy.utils
from PIL import Image

class SlowSampler:
    @classmethod
    def INPUT_TYPES(cls):
        seed = ("INT", {"default": 0, "min": 0, "max": 2**64 - 1})
        steps = ("INT", {"default": 4, "min": 1, "max": 999})
        return {"required": {"latent_image": ("IMAGE",), "text": ("STRING", {}), "seed": seed, "steps": steps}}
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "sample", "tests"

    def sample(self, latent_image, text, seed, steps):
        bar = comfy.utils.ProgressBar(steps)
        for step in range(steps):
            time.sleep(0.03)
            bar.update_absolute(step + 1, steps, ("JPEG", Image.new("RGB", (16, 16)), 16))
        if text == "fail":
            raise ValueError("a failure that shows late")
        return (latent_image,)

NODE_CLASS_MAPPINGS = {"SlowSampler": SlowSampler}
"""
FOLDERS = ("custom_nodes", "models/checkpoints", "input", "output", "temp", "page", "flows")


def _node(kind: str, title: str = "", **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}


SAMPLER = _node("SlowSampler", "nexus:prompt nexus:seed nexus:steps", latent_image=["1", 0], text="", seed=0, steps=4)
FLOWS = {
    "text": {
        "1": _node("EmptyImage", "nexus:size", width=64, height=64, batch_size=1, color=0),
        "2": SAMPLER,
        "3": _node("SaveImage", images=["2", 0], filename_prefix="nexus"),
    },
    "picture": {
        "1": _node("MaskToImage", mask=["5", 0]),
        "2": SAMPLER,
        "3": _node("PreviewImage", "nexus:output", images=["2", 0]),
        "4": _node("LoadImage", "nexus:image", image="any.png"),
        "5": _node("LoadImageMask", "nexus:mask", image="any.png", channel="alpha"),
        "6": _node("PreviewImage", images=["4", 0]),
    },
}


class RealComfyUI:
    """A ComfyUI of our own in a folder of its own."""

    def __init__(self, base: Path) -> None:
        for folder in FOLDERS:
            (base / folder).mkdir(parents=True)
        (base / "custom_nodes/slow_sampler.py").write_text(NODE)
        (base / "page/index.html").write_text("<html></html>")
        (base / "models/checkpoints/none.safetensors").write_text("no weights")
        for name, graph in FLOWS.items():
            (base / f"flows/{name}.json").write_text(json.dumps(graph))
        self.base = base
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self) -> None:
        if self._process is None:
            where = [
                "--port",
                str(self.port),
                "--base-directory",
                str(self.base),
                "--front-end-root",
                f"{self.base}/page",
            ]
            with (self.base / "log").open("ab") as log:
                self._process = subprocess.Popen(
                    bind_to_parent([PYTHON, "main.py", "--cpu", "--disable-api-nodes", *where]),
                    cwd=SOURCE,
                    stdout=log,
                    stderr=log,
                )

    def wait(self) -> None:
        """Until it answers."""
        while True:
            assert self._process is not None
            assert self._process.poll() is None, (self.base / "log").read_text()[-3000:]
            try:
                self.ask("/prompt")
            except OSError:
                time.sleep(0.2)
            else:
                return

    def ask(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=5) as answer:
            return json.load(answer)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealComfyUI]:
    server = RealComfyUI(tmp_path_factory.mktemp("comfyui"))
    yield server
    server.end()


@pytest.fixture
async def backend(comfyui: RealComfyUI) -> AsyncIterator[ComfyUIBackend]:
    comfyui.run()
    comfyui.wait()
    backend = ComfyUIBackend(BackendConfig(url=comfyui.url, options={"workflows": str(comfyui.base / "flows")}))
    yield backend
    await backend.close()


class TestContract(AdapterContract):
    @pytest.fixture
    async def rig(self, comfyui: RealComfyUI, backend: ComfyUIBackend) -> AdapterRig:
        async def idle() -> bool:
            queue = await asyncio.to_thread(comfyui.ask, "/queue")
            return not queue["queue_running"] and not queue["queue_pending"]

        async def kill() -> None:
            await asyncio.to_thread(comfyui.end)

        async def start() -> None:
            comfyui.run()

        def check(chunks: list[Chunk], _: Finish) -> None:
            answer = answer_of(chunks)
            assert [image_of(picture).size for picture in answer["data"]] == [(96, 32)]

        return AdapterRig(
            backend=backend,
            capability=Capability.IMAGES,
            short=image_task("text", size="96x32"),
            check=check,
            long=image_task("text", steps=900),
            bad=image_task("text", steps=1000),
            idle=idle,
            kill=kill,
            start=start,
            progress=True,
        )


async def test_previews_steps_and_seeds(backend: ComfyUIBackend) -> None:
    """Two pictures from two runs; the second begins where the first ended."""
    chunks, progress, _ = await outputs_of(
        backend, image_task("text", steps=6, n=2, seed=5, stream=True, partial_images=2)
    )
    events = events_of(chunks)
    kinds = [name.rpartition(".")[2] for name, _ in events]
    assert kinds == ["partial_image", "completed", "partial_image", "completed"]
    assert [data["seed"] for name, data in events if name.endswith("completed")] == [5, 6]
    far = [one.fraction for one in progress if one.fraction is not None]
    assert far == sorted(far)
    assert far[-1] == 1
    assert any(one.preview for one in progress)


async def test_a_picture_and_its_mask(backend: ComfyUIBackend) -> None:
    """What is transparent in the mask is white for ComfyUI: that is what is painted again."""
    mask = picture_bytes((40, 30), mode="RGBA", color=(0, 0, 0, 0))
    files = (file_of("image", picture_bytes((40, 30))), file_of("mask", mask))
    chunks, _, _ = await outputs_of(backend, image_task("picture", files=files))
    image = image_of(answer_of(chunks)["data"][0])
    assert (image.size, image.getpixel((3, 3))) == ((40, 30), (255, 255, 255))
    files = (file_of("image", b"no picture"), file_of("mask", mask))
    with pytest.raises(BackendRefused) as caught:
        await outputs_of(backend, image_task("picture", files=files))
    assert caught.value.info.param == "image"


async def test_a_failure_that_shows_late(backend: ComfyUIBackend) -> None:
    with pytest.raises(BackendError, match=r"SlowSampler \(node 2\): a failure that shows late"):
        await outputs_of(backend, image_task("text", prompt="fail"))


EDIT = (file_of("image", picture_bytes((40, 30))),)
MASKED = (*EDIT, file_of("mask", picture_bytes((40, 30), mode="RGBA", color=(0, 0, 0, 0))))


@pytest.mark.parametrize(
    "fields",
    [{"size": "512x256", "n": 3}, {"files": EDIT}, {"files": MASKED, "size": "64x64", "strength": "0.3"}],
    ids=["text", "edit", "mask"],
)
async def test_our_own_workflows_are_valid(
    fields: dict[str, Any], comfyui: RealComfyUI, backend: ComfyUIBackend
) -> None:
    """ComfyUI takes them; only the weights are missing here."""
    assert await backend.discover()
    plain = ComfyUIBackend(BackendConfig(url=comfyui.url))
    with pytest.raises(BackendError, match="failed in CheckpointLoaderSimple") as caught:
        await outputs_of(
            plain, image_task("none.safetensors", seed=2**64 - 1, guidance="4" if "files" in fields else 4, **fields)
        )
    assert not isinstance(caught.value, BackendRefused)
    await plain.close()
