r"""The contract between a worker and the inference server beside it.

An adapter is one file in this folder: a subclass of `Backend` with a `name`. Four methods; everything else is
optional. What MUST hold:

- `discover()` returns what the server can serve NOW. It raises `BackendUnavailable` when the server does not answer.
- `health()` returns when the server answers and raises `BackendUnavailable` when it does not. It is cheap.
- `run(task)` yields the caller's bytes as `Chunk`s and exactly one `Finish`, last. An end without `Finish` is a
  failure: the worker reports it as one. Bytes are in the endpoint's own form: for a stream, whole SSE frames
  (`data: {…}\n\n`) without the closing `[DONE]`, which the gateway sends; otherwise pieces of the response body.
- A `Chunk` without data says only that the work goes on (it also counts `tokens`): it resets the worker's time limits,
  and nothing is sent for it. A caller who does not stream gets the body in one piece at the end; without such signs a
  long answer would look like silence.
- Closing the iterator (`aclose()`, also by cancelling the task that awaits it) MUST stop the server's work, or MUST
  NOT return before that work has really ended: until then the slot stays taken.
- What `run` needs of the machine, such as a library, is in `requirements()`: the worker is not ready without it. A model that
  the server lists but cannot run is not in `discover()`'s models but in its `problems`.
- Errors are `BackendError`s. Whatever else escapes is wrapped once, by the worker, as a 502.
- Time limits are the worker's business. An adapter never waits on a clock.
- What a server lacks is never learned from a caller's request, whose errors may hold the caller's words: see `limitations.py`.
- One instance serves many tasks at once, all on one event loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules
from typing import ClassVar, Protocol

from schemas.errors import BackendFailed, ErrorInfo, NexusError, NotFound
from schemas.frames import Progress
from schemas.jobs import Capability, Usage
from schemas.presence import BackendLoad, Limitation, ModelOffer, ServiceRecord


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """How to reach one inference server."""

    url: str = ""
    api_key: str = ""
    models: tuple[str, ...] = ()
    """Serve only these; empty: all that the server has."""
    options: dict[str, str] = field(default_factory=dict)
    """Adapter-specific, as `NAME=value` from the command line."""


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """A file that came with a request."""

    field: str
    """The form's field: `file`, `image`, `mask`."""
    filename: str
    content_type: str
    size: int
    """Bytes."""
    pieces: Callable[[], AsyncIterator[bytes]]
    """Reads it from its beginning; may be called again."""

    async def read(self) -> bytes:
        """All of it, for servers that take it in no other way."""
        return b"".join([piece async for piece in self.pieces()])


StoreFile = Callable[[bytes, str], Awaitable[str]]
"""Keeps bytes of a content type for the caller to fetch. Returns what the answer must hold in the place of their URL."""


async def _refuse_files(_data: bytes, _content_type: str) -> str:
    raise BackendRefused("this worker cannot keep files; ask for b64_json", param="response_format")


@dataclass(frozen=True, slots=True)
class Task:
    """One attempt at one job, as the adapter sees it."""

    job: str
    request_id: str
    capability: Capability
    endpoint: str
    """The OpenAI path, e.g. `/v1/chat/completions`."""
    model: str
    public_model: str
    """The name that answers must carry."""
    stream: bool
    """The caller takes the answer in pieces, as they are made: SSE frames, or for speech the sound itself."""
    body: bytes
    """JSON. Of a multipart form, its fields, without the files."""
    files: tuple[UploadedFile, ...] = ()
    store_file: StoreFile = _refuse_files
    adapt: bool = True
    """What the server lacks is replaced by the nearest equivalent; False: refused."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes for the caller."""

    data: bytes
    tokens: int = 1
    """How many pieces of output (tokens, for text) `data` holds."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The work is complete. MUST be the last thing an adapter yields."""

    usage: Usage | None = None
    content_type: str = "application/json"


@dataclass(frozen=True, slots=True)
class Adaptation:
    """Parameters of the request that were replaced by their nearest equivalent, for the caller to read.

    A later one replaces an earlier one. It comes before the first bytes of a stream.
    """

    parameters: tuple[str, ...]


Output = Chunk | Progress | Finish | Adaptation


@dataclass(frozen=True, slots=True)
class Discovery:
    """What a server serves."""

    models: tuple[ModelOffer, ...]
    slots: int | None = None
    """How many requests it runs at once, where it says."""
    problems: tuple[str, ...] = ()
    """What is not served, and why, for the operator: in the worker's log, its `/readyz` and the registry."""


class Requirement(Protocol):
    """Something that an adapter needs of the worker's machine; `requirements.py` has libraries and programs."""

    @property
    def optional(self) -> bool:
        """Whether the worker is ready without it."""

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """The capabilities whose models it matters to; empty: all."""

    def problem(self) -> str | None:
        """Return what is missing and the command that installs it, or None. May block for as long as an import takes."""


class BackendError(BackendFailed):
    """The inference server failed."""

    def __init__(
        self,
        message: str | None = None,
        *,
        transient: bool = False,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        should_retry: bool | None = None,
        info: ErrorInfo | None = None,
    ) -> None:
        super().__init__(
            message, code=code, param=param, retry_after_s=retry_after_s, should_retry=should_retry, info=info
        )
        self.transient = transient
        """Another attempt, perhaps on another worker, may succeed."""
        self.unanswered = False
        """The connection broke before a byte of the answer: the server may be gone."""


class BackendUnavailable(BackendError):
    """The inference server does not answer."""

    status = 503
    type = "server_error"
    code = "backend_unavailable"
    retry_after_s = 5.0

    def __init__(
        self,
        message: str | None = None,
        *,
        retry_after_s: float | None = None,
        pause_s: float | None = None,
        unsent: bool = False,
        info: ErrorInfo | None = None,
    ) -> None:
        super().__init__(message, transient=True, retry_after_s=retry_after_s, info=info)
        self.pause_s = pause_s
        """The server itself asks to be left alone with this model for so long: `Retry-After`, or it loads the model."""
        self.unsent = unsent
        """No connection could be made: the server has seen nothing of the request."""


class BackendRefused(BackendError):
    """The inference server refused the request: it is wrong, and the same request never works."""

    status = 400
    type = "invalid_request_error"
    code: ClassVar[str | None] = None


class ModelNotServed(BackendRefused):
    """The inference server does not have this model."""

    status = 404
    code = "model_not_found"


def is_unreachable(error: BaseException | None) -> bool:
    """Return whether an error, or one that it was made from, says that the server may be gone."""
    while isinstance(error, BackendError):
        if error.unanswered or (isinstance(error, BackendUnavailable) and error.unsent):
            return True
        error = error.__cause__
    return False


def _ignore_change() -> None:
    pass


class Backend(ABC):
    """An adapter. See the module's docstring for what MUST hold."""

    name: ClassVar[str] = ""
    option_names: ClassVar[frozenset[str] | None] = None
    """The options that it has; None where it checks them itself."""
    default_slots: ClassVar[int] = 4
    adapters: ClassVar[dict[str, type[Backend]]] = {}

    single_server: ClassVar[bool] = True
    """Whether all models go when one connection is refused; False: each may be on a server of its own."""
    manages_models: ClassVar[bool] = False
    """Whether it runs `/v1/models/pull`, `load` and `unload`, as tasks of the capability `models`."""

    def __init__(self, config: BackendConfig) -> None:
        """Raise ValueError when an option is unknown or invalid."""
        unknown = sorted(name for name in config.options if not self.has_option(name))
        if unknown:
            known = f"; it has {', '.join(sorted(self.option_names))}" if self.option_names else ""
            raise ValueError(f"the {self.name} adapter has no option {', '.join(unknown)}{known}")
        self.config = config
        self.notify_changed: Callable[[], None] = _ignore_change
        """To be called when what the server serves has changed: `discover` follows at once. The worker sets it."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        name = cls.__dict__.get("name")
        if not name:
            return
        if name in Backend.adapters:
            raise TypeError(
                f"two adapters are called {name!r}: {Backend.adapters[name].__module__} and {cls.__module__}"
            )
        Backend.adapters[name] = cls

    @classmethod
    def has_option(cls, name: str) -> bool:
        """Return whether the adapter has an option of this name."""
        return cls.option_names is None or name in cls.option_names

    async def start(self) -> None:
        """Open what `run` needs. MUST NOT require the server to be up."""

    async def close(self) -> None:
        """Close everything. No task runs any more."""

    def requirements(self) -> tuple[Requirement, ...]:
        """Return what the adapter needs of the worker's machine: without it the worker is not ready, and says what to install."""
        return ()

    follows_services: ClassVar[bool] = False
    """Whether `services_changed` is to be called."""

    def services_changed(self, services: Mapping[str, ServiceRecord]) -> None:
        """The HTTP services that the registry holds have changed; `discover` is called soon after."""

    def limitations(self) -> tuple[Limitation, ...]:
        """What probes of the adapter's own have shown that its models lack, for the operator. Asked for often: cheap."""
        return ()

    def load_figures(self) -> BackendLoad | None:
        """Return the load that the server reported last; None where it reports none. Called several times a second."""
        return None

    async def resident_models(self) -> frozenset[str] | None:
        """Return the names of the models that the server holds in memory or is loading now; None: it does not say.

        Cheap: while a model is being loaded, the worker asks several times a second. Raises `BackendError`.
        """
        return None

    @abstractmethod
    async def discover(self) -> Discovery:
        """What the server can serve now."""

    @abstractmethod
    async def health(self) -> None:
        """Return if the server answers, else raise `BackendUnavailable`."""

    @abstractmethod
    def run(self, task: Task) -> AsyncIterator[Output]:
        """Do the work. An async generator."""


ENTRY_POINTS = "nexus.backends"


def load_adapters(importer: Callable[[str], object] = import_module) -> dict[str, type[Backend]]:
    """Every adapter, by name: those in this folder, and those that installed packages bring as entry points.

    An adapter that does not import is an error, not a silence. Raises ImportError.
    """
    package = __name__.rpartition(".")[0]
    path = import_module(package).__path__
    for module in iter_modules(path):
        importer(f"{package}.{module.name}")
    brought: dict[str, str] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        origin = entry.dist.name if entry.dist is not None else entry.value
        if brought.setdefault(entry.name, origin) != origin:
            raise ImportError(
                f"two packages bring an adapter called {entry.name!r}: {brought[entry.name]} and {origin}"
            )
        _load(entry, origin)
    return dict(Backend.adapters)


def _load(entry: EntryPoint, origin: str) -> None:
    where = f"the adapter {entry.name!r} of the package {origin}"
    try:
        entry.load()
    except Exception as error:
        raise ImportError(f"{where} does not import: {type(error).__name__}: {error}") from error
    kind = Backend.adapters.get(entry.name)
    if kind is None:
        raise ImportError(f"{where} is not there: {entry.value} holds no Backend of that name")
    if kind.__module__.startswith(f"{__name__.rpartition('.')[0]}."):
        raise ImportError(f"{where} has the name of one of Nexus's own")


def unknown_adapter_message(kind: str, kinds: Iterable[str]) -> str:
    """Return the message for a kind that there is not, with the one that may be meant."""
    near = get_close_matches(kind, kinds, n=1)
    meant = f". Did you mean {near[0]!r}? There are" if near else "; there are"
    return f"there is no backend called {kind!r}{meant}: {', '.join(sorted(kinds))}"


def make_backend(kind: str, config: BackendConfig) -> Backend:
    """The adapter called `kind`. Raises NotFound, naming the ones there are."""
    kinds = load_adapters()
    if kind not in kinds:
        raise NotFound(unknown_adapter_message(kind, kinds))
    return kinds[kind](config)


def wrap_exception(error: Exception) -> NexusError:
    """The one place where an adapter's foreign exception becomes one of ours."""
    if isinstance(error, NexusError):
        return error
    return BackendError(f"the backend failed: {type(error).__name__}: {error}")
