"""Frames over a real connection: whole ones in order however they arrive, turns and pauses, and why it ended."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from penstock.cluster import wire
from penstock.cluster.router import frame_flow
from penstock.cluster.router.frame_flow import FrameFlow
from penstock.pool.net.push_stream import PushStream
from tests.asking import WAIT_S


class Server:
    """One connection: a greeting of four bytes is awaited, then frames are taken."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.useful = 1.0
        self.pauses: list[float] = []
        self.pause_s = 0.0
        self.stream: PushStream | None = None
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def connected(self, stream: PushStream) -> None:
        self.stream = stream
        try:
            assert await stream.readexactly(4) == b"hell"
            FrameFlow(stream, self.take, self.pause, self.over)
            self.ended.set_result(await self.over)
        except Exception as error:  # noqa: BLE001 (the test looks at it)
            self.ended.set_exception(error)

    def take(self, body: bytes) -> float | str:
        if body == b"leave":
            return "it left"
        if body == b"bad":
            raise wire.ProtocolError("no message")
        self.taken.append(body)
        return self.useful

    def pause(self, wasted_s: float) -> float:
        assert wasted_s > 0.0
        self.pauses.append(wasted_s)
        return self.pause_s

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not true():
                await asyncio.sleep(0.001)


def served(client: Callable[[Server, socket.socket], Awaitable[None]]) -> None:
    """A server, and what a test does with a client's socket."""

    async def run() -> None:
        loop, server = asyncio.get_running_loop(), Server()
        listener = socket.create_server(("127.0.0.1", 0))
        accepting = await loop.create_server(lambda: PushStream(server.connected, 1 << 16), sock=listener)
        with socket.create_connection(listener.getsockname()) as sock:
            sock.setblocking(False)
            await client(server, sock)
        accepting.close()
        assert server.stream is not None
        server.stream.transport.abort()

    asyncio.run(run())


def frames(*bodies: bytes) -> bytes:
    return b"".join(wire.LENGTH.pack(len(body)) + body for body in bodies)


def test_frames_come_whole_and_in_order_however_their_bytes_arrive() -> None:
    bodies = [b"a", b"", b"c" * 5000, b"d"]

    async def client(server: Server, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        data = b"hell" + frames(*bodies)
        await loop.sock_sendall(sock, data[:3])
        for at in range(3, 20):
            await loop.sock_sendall(sock, data[at : at + 1])
            await asyncio.sleep(0)
        await loop.sock_sendall(sock, data[20:])
        await server.until(lambda: server.taken == bodies)
        await loop.sock_sendall(sock, frames(b"leave", b"never taken"))
        assert await server.ended == "it left" and server.taken == bodies

    served(client)


def test_frames_that_came_with_the_greeting_are_taken_too() -> None:
    async def client(server: Server, sock: socket.socket) -> None:
        await asyncio.get_running_loop().sock_sendall(sock, b"hell" + frames(b"a", b"b", b"leave"))
        assert await server.ended == "it left" and server.taken == [b"a", b"b"]

    served(client)


def test_others_have_their_turn_between_frames_and_pauses_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_flow, "AT_ONCE_S", 0.0)
    count = 50

    async def client(server: Server, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        turns = 0

        def turn() -> None:
            nonlocal turns
            turns += 1
            if not server.ended.done():
                loop.call_soon(turn)

        server.useful = 0.0
        await loop.sock_sendall(sock, b"hell" + frames(*[b"x"] * count, b"leave"))
        turn()
        assert await server.ended == "it left"
        assert len(server.pauses) == count and turns >= count

    served(client)


def test_a_connection_that_pauses_is_not_read() -> None:
    async def client(server: Server, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        server.useful, server.pause_s = 0.0, 3600.0
        many = frames(*[b"x" * 1000] * 4000)
        sending = loop.create_task(loop.sock_sendall(sock, b"hell" + many))
        await server.until(lambda: bool(server.pauses))
        taken, stream = len(server.taken), server.stream
        assert stream is not None and not stream.transport.is_reading()
        await asyncio.sleep(0.05)
        assert len(server.taken) == taken < 4000
        sending.cancel()

    served(client)


@pytest.mark.parametrize("last", [b"", frames(b"bad"), wire.LENGTH.pack(wire.ENGINE_FRAME_BYTES_MAX + 1)])
def test_why_it_ended_is_told(last: bytes) -> None:
    async def client(server: Server, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, b"hell" + frames(b"a") + last)
        if not last:
            sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(wire.ProtocolError if last else asyncio.IncompleteReadError):
            await server.ended
        assert server.taken == [b"a"]

    served(client)


def test_a_stranger_is_not_read_far_ahead_and_its_end_is_told() -> None:
    async def client(server: Server, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, b"he")
        sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(asyncio.IncompleteReadError):
            await server.ended

    served(client)
