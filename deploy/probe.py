#!/usr/local/bin/python3 -IS
"""Whether a process of this container is well: `nexus-probe PORT [PATH]` exits 0 when it answers 2xx.

Run every few seconds beside the process itself, so it imports next to nothing: 20 ms instead of the 300 ms of an HTTP client.
"""

import socket
import sys

TIMEOUT_S = 4


def main() -> int:
    """Ask once; say what was answered, which `docker inspect` shows."""
    port, path = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "/readyz"
    try:
        with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            answer = b""
            while piece := connection.recv(4096):
                answer += piece[: 4096 - len(answer)]
    except OSError as error:
        print(error)  # noqa: T201 - `docker inspect` shows it
        return 1
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    print(head.split(b"\r\n", 1)[0].decode(errors="replace"), body[:512].decode(errors="replace"))  # noqa: T201
    return 0 if status and status[0].startswith(b"2") else 1


if __name__ == "__main__":
    sys.exit(main())
