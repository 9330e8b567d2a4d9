"""Explains why a process cannot listen on a port, to the person who chose it."""

from __future__ import annotations

import errno

from backbone.port_holders import find_port_holder


def describe_listen_error(error: OSError, host: str, port: int, *, port_setting: str, host_setting: str) -> str:
    """Return what is wrong with an address, and which setting to change."""
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} on {host} is in use by {find_port_holder(port)}. "
            f"Choose another port with {port_setting}, or stop that program."
        )
    if error.errno == errno.EACCES:
        return f"port {port} requires administrator rights. Choose one above 1023 with {port_setting}."
    if error.errno == errno.EADDRNOTAVAIL or error.errno is None or error.errno < 0:  # below 0: an error of getaddrinfo
        return f"this machine has no address {host}. Choose another one with {host_setting}."
    return f"cannot listen on {host}:{port}: {error.strerror}. See {port_setting} and {host_setting}."
