"""A TCP proxy in front of a broker that can be told to refuse, stall or reset connections."""

import socket
import struct
import threading
from contextlib import suppress

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of zero seconds: close by RST instead of FIN


class Proxy:
    """Forwards from `port` to a port of this machine, until `close`."""

    def __init__(self, port: int, target: int) -> None:
        self.port = port
        self._target = target
        self._flowing = threading.Event()
        self._flowing.set()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.accept()

    def accept(self) -> None:
        """Take new connections."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._serve, args=[self._listener], daemon=True).start()

    def refuse(self) -> None:
        """Refuse new connections and end those there are; `accept` undoes it."""
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        self.reset()

    def stall(self) -> None:
        """Keep connections and pass nothing on; `flow` undoes it."""
        self._flowing.clear()

    def flow(self) -> None:
        """Pass everything on again."""
        self._flowing.set()

    def reset(self) -> None:
        """End all connections by RST."""
        for each in list(self._open):
            with suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                each.shutdown(socket.SHUT_RD)
            each.close()
        self._open.clear()

    def close(self) -> None:
        """End everything."""
        self.flow()
        self.refuse()

    def _serve(self, listener: socket.socket) -> None:
        with suppress(OSError):  # raised by `accept` once the listener is closed
            while True:
                self._join(listener.accept()[0])

    def _join(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            near.close()
            return
        self._open |= {near, far}
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._flowing.wait()
                sink.sendall(data)
        for each in (source, sink):
            self._open.discard(each)
            each.close()
