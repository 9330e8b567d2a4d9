"""A port in use is named, with the flag that changes it."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from cli.errors import ConsoleError
from cli.stack.ports import RequestedPort, check_ports, free_port, is_free

HOST = "127.0.0.1"


@pytest.fixture
def taken():
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_free_port_passes():
    """And can be listened on afterwards."""
    port = free_port()
    check_ports(RequestedPort("--port", HOST, port))
    with socket.socket() as listener:
        listener.bind((HOST, port))


@pytest.mark.parametrize("flag", ["--port", "--observability-port"])
def test_taken_port_is_named_with_its_flag(taken: int, flag: str):
    """Both ports are looked at."""
    with pytest.raises(ConsoleError) as caught:
        check_ports(RequestedPort("--else", HOST, free_port()), RequestedPort(flag, HOST, taken))
    assert str(taken) in str(caught.value)
    assert flag in str(caught.value)


def test_every_port_of_a_range_is_checked():
    """The second gateway's observability port counts too."""
    with ExitStack() as stack:
        while True:
            listener = stack.enter_context(socket.socket())
            listener.bind((HOST, 0))
            listener.listen()
            taken = listener.getsockname()[1]
            if is_free(taken - 1):
                break
        with pytest.raises(ConsoleError, match=str(taken)):
            check_ports(RequestedPort("--observability-port", HOST, taken - 1, 2))


def test_listener_on_all_addresses_counts():
    """0.0.0.0 holds 127.0.0.1 as well."""
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        with pytest.raises(ConsoleError, match="in use"):
            check_ports(RequestedPort("--port", HOST, listener.getsockname()[1]))


def test_port_just_left_is_free():
    """Connections in TIME_WAIT do not keep a stack from starting again."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, 0))
        listener.listen()
        port = listener.getsockname()[1]
        client = socket.create_connection((HOST, port))
        served, _ = listener.accept()
        served.close()  # the server's side closes first, and waits
        client.close()
    check_ports(RequestedPort("--port", HOST, port))


def test_same_port_twice_names_both_flags():
    """The user chose one port for two things."""
    port = free_port()
    with pytest.raises(ConsoleError) as caught:
        check_ports(RequestedPort("--port", HOST, port), RequestedPort("--observability-port", HOST, port))
    assert "--port" in str(caught.value)
    assert "--observability-port" in str(caught.value)


@pytest.mark.parametrize("port", [0, 65536])
def test_impossible_port(port: int):
    """Also at the end of a range."""
    with pytest.raises(ConsoleError, match="--port"):
        check_ports(RequestedPort("--port", HOST, port))


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_address_of_another_machine(host: str):
    """The message points to --host."""
    with pytest.raises(ConsoleError, match="--host"):
        check_ports(RequestedPort("--port", host, free_port()))
