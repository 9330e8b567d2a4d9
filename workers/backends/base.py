r"""The contract between a worker and the inference server beside it.

An adapter is one file or one folder here: a subclass of `Backend` with a `name`. Three methods are required: `discover`, `health` and
`run`; all others are optional. What MUST hold:

- `discover()` returns the models that the server can serve NOW. It raises `BackendUnavailable` when the server does not answer.
- `health()` returns when the server answers and raises `BackendUnavailable` when it does not. It is cheap.
- `run(task)` yields the caller's bytes as `Chunk`s and exactly one `Finish`, last. A run that ends without `Finish` is a failure, and
  the worker reports it as one. The bytes are in the endpoint's own form: for a stream, whole SSE frames (`data: {…}\n\n`) without the
  closing `[DONE]`, which the gateway sends; otherwise pieces of the response body.
- A `Chunk` without data reports that the work goes on (it also counts `tokens`): it resets the worker's time limits, and nothing is sent for
  it. A caller who does not stream gets the body in one piece at the end; without such chunks a long response would look like silence.
- Closing the iterator (`aclose()`, also by cancelling the task that awaits it) MUST stop the server's work, or MUST NOT return before
  that work has ended: until then the slot stays occupied.
- `requirements()` names what `run` needs of the machine, such as a library: the worker is not ready without it. A model that the server lists
  but cannot run is not in the models of `discover()` but in its `problems`.
- Errors are `BackendError`s. The worker wraps any other exception once, as a 502.
- Time limits are the worker's. An adapter never sets a timeout for the server's work.
- An adapter never learns from a caller's request which features a server lacks: the request's errors may hold the caller's words. See
  `adapter_kit/limitations.py`.
- One instance runs many tasks at once, all on one event loop.
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

from schemas.descriptors import ModelDescriptor
from schemas.errors import BackendFailed, ErrorInfo, NexusError, NotFound
from schemas.frames import Progress
from schemas.jobs import Capability, Usage
from schemas.presence import BackendLoad, Limitation, ModelOffer, ServiceRecord
from schemas.usage import MediaUsage


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """Settings of one worker for its inference server."""

    url: str = ""
    api_key: str = ""
    models: tuple[str, ...] = ()
    """The models to serve; empty: all of the server's."""
    options: dict[str, str] = field(default_factory=dict)
    """Options of the adapter, `NAME=VALUE` on the command line."""


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """A file that the caller uploaded with a request."""

    field: str
    """The form's field, such as `file`, `image` or `mask`."""
    filename: str
    content_type: str
    size: int
    """Bytes."""
    pieces: Callable[[], AsyncIterator[bytes]]
    """Read the file from its beginning, in pieces. May be called again."""

    async def read(self) -> bytes:
        """Return the whole file, for servers that do not take it in pieces."""
        return b"".join([piece async for piece in self.pieces()])


StoreFile = Callable[[bytes, str], Awaitable[str]]
"""Store bytes of a content type for the caller to fetch, and return the text that stands for their URL in the response."""


Push = Callable[[bytes, int], None]
"""Send bytes for the caller, and how many tokens they hold."""


async def _refuse_files(_data: bytes, _content_type: str) -> str:
    raise BackendRefused("This worker cannot store files. Send response_format=b64_json.", param="response_format")


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
    """The model's name in the response."""
    stream: bool
    """Whether the caller takes the response in pieces as they are made: SSE frames, or for speech the audio itself."""
    body: bytes
    """The request's body as JSON; of a multipart form, its fields without the files."""
    files: tuple[UploadedFile, ...] = ()
    store_file: StoreFile = _refuse_files
    adapt: bool = True
    """Whether a parameter that the server lacks is replaced by its nearest equivalent; else the request is refused."""
    push: Push | None = None
    """Does for the bytes what yielding a Chunk does, without a turn of the task. An adapter may call it while `run` waits for its server; None: it must
    yield.
    """


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes for the caller."""

    data: bytes
    tokens: int = 1
    """Pieces of output in `data`: tokens, for text."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a complete response. MUST be the last output of a run."""

    usage: Usage | None = None
    content_type: str = "application/json"
    media: MediaUsage | None = None
    """What was made or read besides tokens, for the operator's usage ledger."""


@dataclass(frozen=True, slots=True)
class Adaptation:
    """Names of the request's parameters that were replaced by their nearest equivalents, for the caller to read.

    A later adaptation replaces an earlier one. It comes before the first bytes of a stream.
    """

    parameters: tuple[str, ...]


Output = Chunk | Progress | Finish | Adaptation


@dataclass(frozen=True, slots=True)
class Discovery:
    """The models that a server can serve now."""

    models: tuple[ModelOffer, ...]
    slots: int | None = None
    """Requests that the server runs at once; None where it does not report them."""
    problems: tuple[str, ...] = ()
    """Sentences for the operator on models that are not served. They stand in the worker's log, its `/readyz` and the registry."""


class Requirement(Protocol):
    """A library or program that an adapter needs on the worker's machine; see `adapter_kit/requirements.py`."""

    @property
    def optional(self) -> bool:
        """Return whether the worker is ready without it."""

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """Return the capabilities whose models need it; empty: all."""

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
        """Whether another attempt, perhaps on another worker, may succeed."""
        self.unanswered = False
        """Whether the connection broke before the first byte of the response: the server may be down."""


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
        """Seconds for which the server asks for no more requests for this model: `Retry-After`, or the model is loading."""
        self.unsent = unsent
        """Whether no connection could be made, so that the server received nothing of the request."""


class BackendRefused(BackendError):
    """The inference server refused the request as invalid: the same request never works."""

    status = 400
    type = "invalid_request_error"
    code: ClassVar[str | None] = None


class ModelNotServed(BackendRefused):
    """The inference server does not have this model."""

    status = 404
    code = "model_not_found"


def is_unreachable(error: BaseException | None) -> bool:
    """Return whether an error or one of its causes shows that the server may be down."""
    while isinstance(error, BackendError):
        if error.unanswered or (isinstance(error, BackendUnavailable) and error.unsent):
            return True
        error = error.__cause__
    return False


def _ignore_change() -> None:
    pass


class Backend(ABC):
    """Base class of adapters. The module's docstring says what MUST hold."""

    name: ClassVar[str] = ""
    option_names: ClassVar[frozenset[str] | None] = None
    """Names of the options; None where the adapter checks them itself."""
    default_slots: ClassVar[int] = 4
    adapters: ClassVar[dict[str, type[Backend]]] = {}

    single_server: ClassVar[bool] = True
    """Whether one server has all models, so that a refused connection stops all of them."""
    manages_models: ClassVar[bool] = False
    """Whether the adapter runs `/v1/models/pull`, `load` and `unload`, as tasks of the capability `models`."""

    def __init__(self, config: BackendConfig) -> None:
        """Raise ValueError when an option is unknown or invalid."""
        unknown = sorted(name for name in config.options if not self.has_option(name))
        if unknown:
            known = f"; it has {', '.join(sorted(self.option_names))}" if self.option_names else ""
            raise ValueError(f"the {self.name} adapter has no option {', '.join(unknown)}{known}")
        self.config = config
        self.notify_changed: Callable[[], None] = _ignore_change
        """Call this when the served models have changed: the worker calls `discover` at once. The worker sets it."""

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
        """Open the resources that `run` needs. MUST NOT require the server to be up."""

    async def close(self) -> None:
        """Close all resources. No task is running."""

    def requirements(self) -> tuple[Requirement, ...]:
        """Return what the adapter needs on the worker's machine. Without it the worker is not ready, and names the command that installs it."""
        return ()

    follows_services: ClassVar[bool] = False
    """Whether the worker calls `services_changed`."""

    def services_changed(self, services: Mapping[str, ServiceRecord]) -> None:
        """Take the HTTP services that the registry holds now. The worker calls `discover` soon after."""

    def limitations(self) -> tuple[Limitation, ...]:
        """Return the features that the adapter's own probes found missing, for the operator. Called several times a second."""
        return ()

    def load_figures(self) -> BackendLoad | None:
        """Return the load that the server reported last; None where it reports none. Called several times a second."""
        return None

    def describe(self, _offer: ModelOffer) -> ModelDescriptor | None:
        """Return the parameters of a discovered model; None: the usual ones of its endpoints.

        The worker calls it after each discovery, for every model: return the same object while nothing has changed. MUST NOT wait.
        `schemas/parameters` builds descriptors; docs/how-to/adapters.md says how.
        """
        return None

    async def resident_models(self) -> frozenset[str] | None:
        """Return the names of the models that the server holds in memory or is loading; None where it does not report them.

        It is cheap: while a model loads, the worker calls it several times a second. Raises `BackendError`.
        """
        return None

    @abstractmethod
    async def discover(self) -> Discovery:
        """Return the models that the server can serve now."""

    @abstractmethod
    async def health(self) -> None:
        """Return when the server answers. Raises `BackendUnavailable` when it does not."""

    @abstractmethod
    def run(self, task: Task) -> AsyncIterator[Output]:
        """Run a task on the server. An async generator."""


ENTRY_POINTS = "nexus.backends"
_PACKAGE = __name__.rpartition(".")[0]


def load_adapters(importer: Callable[[str], object] = import_module) -> dict[str, type[Backend]]:
    """Return every adapter by name: those in this folder, and those that installed packages provide as entry points.

    Raises ImportError when an adapter cannot be imported.
    """
    for name in _modules():
        importer(f"{_PACKAGE}.{name}")
    _load_provided()
    return dict(Backend.adapters)


def load_adapter(kind: str) -> type[Backend]:
    """Return the adapter of this name. Of those in this folder, no other is imported.

    Raises NotFound, which names all adapters, and ImportError when the adapter, or one of a package, cannot be imported.
    """
    if kind in _modules():
        import_module(f"{_PACKAGE}.{kind}")
    _load_provided()
    if kind not in Backend.adapters:
        raise NotFound(_unknown_adapter_message(kind, load_adapters()))
    return Backend.adapters[kind]


def _modules() -> list[str]:
    """Return the modules in this folder. One that holds an adapter has the adapter's name."""
    return [module.name for module in iter_modules(import_module(_PACKAGE).__path__)]


def _load_provided() -> None:
    provided: dict[str, str] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        origin = entry.dist.name if entry.dist is not None else entry.value
        if provided.setdefault(entry.name, origin) != origin:
            raise ImportError(
                f"two packages provide an adapter called {entry.name!r}: {provided[entry.name]} and {origin}. Uninstall one of them."
            )
        _load(entry, origin)


def _load(entry: EntryPoint, origin: str) -> None:
    where = f"the adapter {entry.name!r} of the package {origin}"
    if entry.name in _modules():
        raise ImportError(f"{where} has the name of an adapter of Nexus; rename it")
    try:
        entry.load()
    except Exception as error:
        raise ImportError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    if entry.name not in Backend.adapters:
        raise ImportError(
            f"{where} does not exist: the module {entry.value} defines no Backend with name = {entry.name!r}"
        )


def _unknown_adapter_message(kind: str, kinds: Iterable[str]) -> str:
    near = get_close_matches(kind, kinds, n=1)
    meant = f". Did you mean {near[0]!r}? There are" if near else "; there are"
    return f"there is no backend called {kind!r}{meant}: {', '.join(sorted(kinds))}"


def make_backend(kind: str, config: BackendConfig) -> Backend:
    """Return a new adapter of this name. Raises as `load_adapter` does, and ValueError for a wrong configuration."""
    return load_adapter(kind)(config)


def wrap_exception(error: Exception) -> NexusError:
    """Return the NexusError that stands for an exception of an adapter. Only the worker calls it."""
    if isinstance(error, NexusError):
        return error
    return BackendError(f"the backend failed: {type(error).__name__}: {error}")
