"""A TCP proxy in front of a relay or node: it can damage, hold or cut what goes through, in either direction."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

LARGE_BYTES = 4096  # a piece of this size is payload


class FaultyWire:
    """`address` leads to `target`. `damage_up` / `damage_down`: so many of the next large pieces get a flipped bit.
    `hold` stops all bytes until `go_on`; `cut` ends all connections, and new ones are refused until `mend`."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.damage_up = self.damage_down = 0
        self.damaged = 0
        self.bytes_up = self.bytes_down = 0
        self._go = threading.Event()
        self._go.set()
        self._hold_blocks = False
        self.held_down = 0  # large pieces that came while they were held
        self._is_cut = False
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self) -> None:
        self._go.clear()

    def hold_down(self) -> None:
        """Hold connections on which a large piece comes down from now on."""
        self._hold_blocks = True

    def go_on(self) -> None:
        self._hold_blocks = False
        self._go.set()

    def cut(self) -> None:
        self._is_cut = True
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._go.set()

    def mend(self) -> None:
        self._is_cut = False

    def close(self) -> None:
        self.cut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                local, _ = self._listener.accept()
                if self._is_cut:
                    local.close()
                    continue
                remote = socket.create_connection(self._target, timeout=5)
            except OSError:
                if self._listener.fileno() < 0 or self._is_cut:
                    return
                local.close()
                continue
            remote.settimeout(None)
            with self._lock:
                self._sockets |= {local, remote}
            for source, sink, up in ((local, remote, True), (remote, local, False)):
                threading.Thread(target=self._pipe, args=(source, sink, up), daemon=True).start()

    def _pipe(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        buffer = bytearray(1 << 16)
        with contextlib.suppress(OSError):
            while count := source.recv_into(buffer):
                self._go.wait()
                if count >= LARGE_BYTES and not up and self._hold_blocks:
                    self.held_down += 1
                    while self._hold_blocks and not self._is_cut:
                        time.sleep(0.005)
                if count >= LARGE_BYTES:
                    self._maybe_damage(buffer, count, up)
                if up:
                    self.bytes_up += count
                else:
                    self.bytes_down += count
                sink.sendall(memoryview(buffer)[:count])
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _maybe_damage(self, buffer: bytearray, count: int, up: bool) -> None:
        with self._lock:
            left = self.damage_up if up else self.damage_down
            if not left:
                return
            if up:
                self.damage_up -= 1
            else:
                self.damage_down -= 1
            self.damaged += 1
        buffer[count - LARGE_BYTES // 2] ^= 0x20
