"""Have a process forked in the place of this one, which then ends as it does: `tests.fork_server.forked`.

It runs without Python's site packages, whose start it saves.
"""

import json
import os
import signal
import socket
import sys

_, address, module, *arguments = sys.argv
order = {"module": module, "arguments": arguments, "env": dict(os.environ), "cwd": os.getcwd()}  # noqa: PTH109 - pathlib is slow to import
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1024 * 1024)
server.connect(f"\0{address}")
socket.send_fds(server, [json.dumps(order).encode()], [0, 1, 2])
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, lambda number, _: server.send(b"%d" % number))
for stream in (0, 1, 2):
    os.close(stream)
code = int(server.recv(16) or 70)
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
