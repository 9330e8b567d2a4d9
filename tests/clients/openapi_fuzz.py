"""Call every route of a Nexus as its OpenAPI document says, and compare: `make fuzz`, and `test_openapi_contract.py`.

make fuzz                                    from another seed each time, some minutes
make fuzz ARGS="--seed 7 --max-examples 500" all flags of `schemathesis run`
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import tempfile
from pathlib import Path

from tests.cluster import KEY, Cluster

MODELS = "smollm2,multilingual-e5-small,bge-reranker-v2-m3,sd-turbo,en_US-joe-medium,omni-moderation-latest"
"""Those of the document's examples."""
WORKER = "w1"
HELLO = {"role": "user", "content": "hello"}


async def start(cluster: Cluster) -> None:
    """Start a gateway that shows its documentation, and a worker that can do everything, with short answers to the longest requests."""
    await cluster.start_gateway(PUBLIC_ROUTES="metrics,docs,readiness")
    await cluster.start_worker("echo", name=WORKER, WORKER_MODELS=MODELS, WORKER_BACKEND_OPTIONS="size=2000")


async def existing(cluster: Cluster) -> dict[str, str]:
    """Make one of everything that schemathesis cannot make by itself; return ids by the paths that begin with them."""

    async def job(**script: str) -> str:
        body = {"model": "smollm2", "messages": [{"role": "user", "content": "hi"}], "echo": script}
        made = (await cluster.post("/v1/jobs", {"endpoint": "/v1/chat/completions", "body": body})).json()["id"]
        return (await cluster.get(f"/v1/jobs/{made}?wait=30")).json()["id"]

    line = {
        "custom_id": "1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "smollm2", "messages": [HELLO]},
    }
    upload = await cluster.http.post(
        cluster.url + "/v1/files", files={"file": ("in.jsonl", json.dumps(line).encode())}, data={"purpose": "batch"}
    )
    file = upload.json()["id"]
    batch = await cluster.post(
        "/v1/batches", {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    )
    response = await cluster.post("/v1/responses", {"model": "smollm2", "input": "hi", "background": True})
    key = await cluster.post("/v1/keys", {"name": "seen"})
    picture = await cluster.post(
        "/v1/images/generations", {"model": "sd-turbo", "prompt": "x", "response_format": "url"}
    )
    params = {"model": "smollm2", "max_tokens": 9, "messages": [HELLO]}
    messages = await cluster.post("/v1/messages/batches", {"requests": [{"custom_id": "1", "params": params}]})
    return {
        "/v1/messages/batches/": messages.json()["id"],
        "/v1/jobs/": await job(),
        "/v1/dlq/": await job(fail="before"),
        "/v1/files/": file,
        "/v1/batches/": batch.json()["id"],
        "/v1/responses/": response.json()["id"],
        "/v1/keys/": key.json()["id"],
        "/v1/results/": picture.json()["data"][0]["url"],
    }


async def fuzz(cluster: Cluster, *arguments: str) -> tuple[int, str]:
    """Run schemathesis with all of its checks; return its exit code and what it prints."""
    # The gateway makes the document when it is first read, which takes a busy machine longer than schemathesis waits.
    await cluster.http.get(f"{cluster.url}/openapi.json", timeout=60.0)
    there = json.dumps(await existing(cluster))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "schemathesis.cli", "--no-color", "run", cluster.url + "/openapi.json",
        "--header", f"Authorization: Bearer {KEY}",
        # With a list of what no schema can say: `openapi_hooks.py`.
        "--exclude-checks", "positive_data_acceptance",
        # It has no end: each call would take until the timeout. The flow tests read it.
        "--exclude-path", "/v1/overview/events",
        "--request-timeout", "30", "--workers", "1", "--continue-on-failure",
        *arguments,
        cwd=cluster.folder,
        env=os.environ | {"SCHEMATHESIS_HOOKS": "tests.clients.openapi_hooks", "NEXUS_FUZZ_IDS": there, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = await process.communicate()
    except BaseException:
        process.kill()
        raise
    return process.returncode or 0, output.decode(errors="replace")


async def main() -> int:
    """Run it on a Nexus of its own."""
    given = sys.argv[1:]
    defaults = {"--max-examples": "100", "--seed": str(secrets.randbelow(10**6))}
    arguments = [part for name, value in defaults.items() if name not in given for part in (name, value)]
    with tempfile.TemporaryDirectory(prefix="nexus-fuzz-") as folder:
        async with Cluster(Path(folder)) as cluster:
            await start(cluster)
            code, output = await fuzz(cluster, *arguments, *given)
    print(output)
    return code


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
