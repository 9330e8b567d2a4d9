"""The ledger's database: it is opened when it is first used, and again after each failure.

SQLAlchemy's engine works in threads of its own, never on the event loop. They are daemons: a server that does not answer keeps
no gateway from stopping.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from backbone.ledger.access import LedgerAccess
from backbone.secret_files import ConfigurationError
from schemas.errors import Unavailable

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

T = TypeVar("T")

MAX_READERS = 3
CONNECT_TIMEOUT_S = 5
WRITE_TIMEOUT_S = 60.0
READ_TIMEOUT_S = 30.0
BUSY_TIMEOUT_MS = 10_000
"""How long SQLite waits for another process that writes."""
PROGRESS_STEPS = 100_000
"""Steps of SQLite's virtual machine between two looks at the clock."""
MIGRATION_LOCK = 0x6E65787573
"""PostgreSQL's advisory lock under which one process at a time migrates."""


class LedgerDatabase:
    """Runs transactions, each in a thread. Every failure of the database is Unavailable, and the transaction changed nothing."""

    def __init__(self, access: LedgerAccess) -> None:
        self._access = access
        self._engine: Engine | None = None
        self._opening = threading.Lock()
        self._writers = asyncio.Semaphore(1)
        self._readers = asyncio.Semaphore(MAX_READERS)

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run a transaction that may write, one at a time. Raises Unavailable; after a time-out it may have been committed."""
        return await self._run(lambda: self._transact(work, writes=True), self._writers, WRITE_TIMEOUT_S)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run a transaction that reads. Raises Unavailable."""
        return await self._run(lambda: self._transact(work, writes=False), self._readers, READ_TIMEOUT_S)

    async def close(self) -> None:
        """Close the connections that no thread uses."""
        if self._engine is not None:
            self._engine.dispose()

    async def _run(self, work: Callable[[], T], free: asyncio.Semaphore, timeout_s: float) -> T:
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def settle(value: T | None, error: BaseException | None) -> None:
            free.release()
            if result.done():
                return
            if error is None:
                result.set_result(value)  # type: ignore[arg-type]
            else:
                result.set_exception(error)

        def run() -> None:
            value: T | None = None
            failed: BaseException | None = None
            try:
                value = work()
            except Exception as error:
                failed = _translated(error)
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(settle, value, failed)

        try:
            async with asyncio.timeout(timeout_s):
                await free.acquire()
                threading.Thread(target=run, name="ledger", daemon=True).start()
                return await result
        except TimeoutError:
            raise Unavailable(f"The ledger's database did not answer within {timeout_s:g} s.") from None

    def _transact(self, work: Callable[[Connection], T], *, writes: bool) -> T:
        with self._opened().connect().execution_options(writes=writes) as connection, connection.begin():
            return work(connection)

    def _opened(self) -> Engine:
        with self._opening:
            if self._engine is None:
                engine = _make_engine(self._access)
                try:
                    _migrate(engine)
                except BaseException:
                    engine.dispose()
                    raise
                self._engine = engine
            return self._engine


def _translated(error: Exception) -> Exception:
    """Return the error that callers see. Its message repeats no value of a statement and no password."""
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError

    if isinstance(error, DBAPIError):
        text = str(error.orig).strip().partition("\n")[0]
        return Unavailable(f"The ledger's database cannot be used: {text or type(error.orig).__name__}")
    if isinstance(error, SQLAlchemyError | OSError | ConfigurationError):
        return Unavailable(f"The ledger's database cannot be used: {type(error).__name__}")
    return error


def _make_engine(access: LedgerAccess) -> Engine:
    return _sqlite(access) if access.sqlite_file is not None else _postgresql(access)


def _sqlite(access: LedgerAccess) -> Engine:
    from sqlalchemy import URL, create_engine, event

    assert access.sqlite_file is not None
    access.sqlite_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(access.sqlite_file, os.O_CREAT | os.O_RDONLY, 0o600))
    engine = create_engine(URL.create("sqlite", database=str(access.sqlite_file)))

    def connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy begins transactions below, as sqlite3 would begin them too late
        for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_TIMEOUT_MS}"):
            connection.execute(f"PRAGMA {pragma}").close()

    def begin(connection: Connection) -> None:
        driver = connection.connection.driver_connection
        assert driver is not None
        if connection.get_execution_options().get("writes", True):
            driver.set_progress_handler(None, 0)
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            until = monotonic() + READ_TIMEOUT_S
            driver.set_progress_handler(lambda: monotonic() > until, PROGRESS_STEPS)
            connection.exec_driver_sql("BEGIN")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begin)
    return engine


def _postgresql(access: LedgerAccess) -> Engine:
    from sqlalchemy import create_engine, event

    rest = access.postgresql_url.partition("://")[2]
    engine = create_engine(
        f"postgresql+psycopg://{rest}",
        pool_size=MAX_READERS + 1,
        max_overflow=0,
        pool_pre_ping=True,
        pool_recycle=600,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "application_name": "nexus",
            "options": f"-c statement_timeout={int(READ_TIMEOUT_S * 1000)} -c timezone=UTC",
            "tcp_user_timeout": int(READ_TIMEOUT_S * 1000),
        },
    )
    password = access.password
    if password is not None:

        def connecting(_dialect: Any, _record: Any, _args: Any, parameters: dict[str, Any]) -> None:
            parameters["password"] = password.read()

        event.listen(engine, "do_connect", connecting)
    return engine


def _migrate(engine: Engine) -> None:
    """Bring the tables up to date, in one transaction, one process at a time."""
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from sqlalchemy import text

    config = Config()
    config.set_main_option("script_location", "backbone.ledger:migrations")
    head = ScriptDirectory.from_config(config).get_current_head()
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        present = MigrationContext.configure(connection, opts={"version_table": "ledger_version"})
        if present.get_current_revision() == head:
            return
        from alembic import command

        config.attributes["connection"] = connection
        command.upgrade(config, "head")
