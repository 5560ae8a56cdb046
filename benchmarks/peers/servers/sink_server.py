"""The floor of taking large bodies in Python: ``recv_into`` one buffer, and answer 200; no model.

A plain epoll loop over sockets. Needs no environment: the standard library is all it uses.
"""

from __future__ import annotations

import os
import select
import socket

PORT = int(os.environ["PEER_PORT"])
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
FIELD = b"\r\ncontent-length: "

MAX_BYTES = 1 << 20
"""Room for a request, its head included."""


class Client:
    """One connection, and the request that it is sending."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._buffer = memoryview(bytearray(MAX_BYTES))
        self._got = 0
        self._end = 0  # bytes of the request; 0: its head is not complete

    def receive(self) -> bool:
        """Take what is there, and answer a whole request; False when the connection has ended."""
        got = self.socket.recv_into(self._buffer[self._got :])
        if not got:
            return False
        self._got += got
        if not self._end:
            head = bytes(self._buffer[: min(self._got, 1024)])
            length = head.find(b"\r\n\r\n")
            if length < 0:
                return True
            at = head.lower().index(FIELD) + len(FIELD)
            self._end = length + 4 + int(head[at : head.index(b"\r", at)])
        if self._got == self._end:
            self._got = self._end = 0
            self.socket.sendall(ANSWER)
        return True


def serve() -> None:
    """Serve until killed."""
    clients: dict[int, Client] = {}
    with (
        socket.create_server(("127.0.0.1", PORT), backlog=256) as listener,
        select.epoll() as epoll,
    ):
        epoll.register(listener, select.EPOLLIN)
        while True:
            for fd, _ in epoll.poll():
                if fd == listener.fileno():
                    connection, _ = listener.accept()
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    clients[connection.fileno()] = Client(connection)
                    epoll.register(connection, select.EPOLLIN)
                    continue
                try:
                    alive = clients[fd].receive()
                except ConnectionError:
                    alive = False
                if not alive:
                    epoll.unregister(fd)
                    clients.pop(fd).socket.close()


if __name__ == "__main__":
    serve()
