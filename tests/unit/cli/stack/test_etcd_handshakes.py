"""gRPC's C library writes nothing about failed handshakes: standard error holds lines of JSON."""

from __future__ import annotations

import asyncio
import ssl
import sys
from pathlib import Path

from cli.embedded.certificates import make_certificates

CALL = """
import asyncio, sys
from backbone.registry.auth import EtcdTls
from backbone.registry.etcd_client import create_channel

async def main():
    with open(sys.argv[2], "rb") as authority:
        channel = create_channel("127.0.0.1:" + sys.argv[1], True, EtcdTls(ca=authority.read()))
    channel.get_state(try_to_connect=True)
    while str(channel.get_state()) != "ChannelConnectivity.TRANSIENT_FAILURE":
        await channel.wait_for_state_change(channel.get_state())
    await channel.close()

asyncio.run(asyncio.wait_for(main(), 20))
"""


async def test_a_failed_handshake_writes_nothing_to_standard_error(tmp_path: Path) -> None:
    """A worker without the right authority retries once a second: that was a line of gRPC's own each time."""
    _, pairs = make_certificates(["etcd"])
    another, _ = make_certificates([])
    for name, text in {"crt": pairs["etcd"].certificate, "key": pairs["etcd"].key, "ca": another}.items():
        (tmp_path / name).write_text(text)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    context.set_alpn_protocols(["h2"])
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CALL, str(port), str(tmp_path / "ca"), stderr=asyncio.subprocess.PIPE
    )
    _, written = await process.communicate()
    server.close()
    assert (process.returncode, written.decode()) == (0, "")
