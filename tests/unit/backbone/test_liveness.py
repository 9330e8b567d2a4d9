"""A server that no longer answers is distinguished from a process that stood still itself."""

from __future__ import annotations

from backbone.bus.nats.liveness import MAX_SILENT_TICKS, MAX_TICK_DELAY_S, LivenessMonitor


class Connection:
    """A connection whose state the test sets."""

    def __init__(self) -> None:
        self.connected = True
        self.heard = False
        self.pings = 0

    def take_received(self) -> bool:
        heard, self.heard = self.heard, False
        return heard

    def send_ping(self) -> None:
        self.pings += 1

    async def give_up(self) -> None:
        """The tests look at what `tick` says."""


def test_a_silent_server_is_given_up() -> None:
    """After so many ticks on time, each of which asked for a sign of life; counted from the beginning afterwards."""
    connection = Connection()
    pulse = LivenessMonitor(connection, lambda: 0.0)
    for _ in range(2):
        assert [pulse.tick(0.0) for _ in range(MAX_SILENT_TICKS)] == [False] * MAX_SILENT_TICKS
        assert pulse.tick(0.0)
    assert connection.pings == 2 * MAX_SILENT_TICKS


def test_anything_that_arrives_is_a_sign_of_life() -> None:
    """A server that answers before the last tick is kept, however often; nothing is asked where it speaks by itself."""
    connection = Connection()
    pulse = LivenessMonitor(connection, lambda: 0.0)
    for _ in range(5):
        assert not any(pulse.tick(0.0) for _ in range(MAX_SILENT_TICKS))
        connection.heard = True
        asked = connection.pings
        assert not pulse.tick(0.0)
        assert connection.pings == asked


def test_a_process_without_cpu_blames_nobody() -> None:
    """Ticks that come late do not count: the silence was this process's own."""
    pulse = LivenessMonitor(Connection(), lambda: 0.0)
    assert not any(pulse.tick(MAX_TICK_DELAY_S) for _ in range(100))


def test_a_lost_connection_is_not_silent() -> None:
    """Connecting again is under way, and begins with nothing missed."""
    connection = Connection()
    pulse = LivenessMonitor(connection, lambda: 0.0)
    for _ in range(MAX_SILENT_TICKS):
        pulse.tick(0.0)
    connection.connected = False
    assert not any(pulse.tick(0.0) for _ in range(100))
    connection.connected = True
    assert not any(pulse.tick(0.0) for _ in range(MAX_SILENT_TICKS))
