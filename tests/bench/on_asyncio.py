"""Servers of asyncio, with protocols and with streams, and of uvloop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, cast

from blocking import new_context
from job import READ, SENDERS, Job, announce, lines


class AsyncioPeer(asyncio.Protocol):
    """One connection of the asyncio server."""

    def __init__(self, job: Job, peers: list[AsyncioPeer]) -> None:
        self._job, self._peers = job, peers
        self._payload = job.payload
        self.transport: asyncio.Transport
        self.writable = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one only in what it does
        self.writable.set()
        if self._job.role in ("source", "both"):
            self._send_on()
        elif self._job.role == "lines":
            self._peers.append(self)
            if len(self._peers) == self._job.sessions:
                start_senders(lambda sender: send_lines_by_protocols(self._peers, sender))

    def data_received(self, data: bytes) -> None:
        if self._job.role == "echo":
            self.transport.write(data)

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()
        if self._job.role in ("source", "both"):
            self._send_on()

    def _send_on(self) -> None:
        """Writes until told to pause, but yields to the loop after each block."""
        if self.writable.is_set() and not self.transport.is_closing():
            self.transport.write(self._payload)
            asyncio.get_running_loop().call_soon(self._send_on)


async def send_lines_by_protocols(peers: list[AsyncioPeer], sender: int) -> None:
    """One sender of all sessions."""
    for line in lines(sender):
        for peer in peers:
            if not peer.writable.is_set():
                await peer.writable.wait()
            if peer.transport.is_closing():
                return
            peer.transport.write(line)
        await asyncio.sleep(0)


_tasks = set()


def start_senders(send: Callable[[int], Coroutine[Any, Any, None]]) -> None:
    """A task for each sender."""
    _tasks.update(asyncio.ensure_future(send(sender)) for sender in range(SENDERS))


async def serve_protocols(job: Job) -> None:
    """The server of both asyncio and uvloop."""
    peers: list[AsyncioPeer] = []
    server = await asyncio.get_running_loop().create_server(
        lambda: AsyncioPeer(job, peers), "127.0.0.1", 0, ssl=new_context(job), backlog=4096
    )
    announce(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def serve_asyncio(job: Job) -> None:
    """asyncio with protocols, its fastest form."""
    asyncio.run(serve_protocols(job))


def serve_uvloop(job: Job) -> None:
    """The same on uvloop."""
    import uvloop

    uvloop.run(serve_protocols(job))


async def sink_stream(reader: asyncio.StreamReader) -> None:
    while await reader.read(READ):
        pass


async def source_stream(writer: asyncio.StreamWriter, job: Job) -> None:
    payload = job.payload
    while True:
        writer.write(payload)
        await writer.drain()
        await asyncio.sleep(0)


async def send_lines_by_streams(writers: list[asyncio.StreamWriter], sender: int) -> None:
    """One sender of all sessions."""
    with contextlib.suppress(OSError):
        for line in lines(sender):
            for writer in writers:
                writer.write(line)
                await writer.drain()
            await asyncio.sleep(0)


def serve_asyncio_streams(job: Job) -> None:
    """asyncio with streams, its most comfortable form."""
    writers: list[asyncio.StreamWriter] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            if job.role == "echo":
                while data := await reader.read(READ):
                    writer.write(data)
                    await writer.drain()
            elif job.role == "source":
                await source_stream(writer, job)
            elif job.role == "sink":
                await sink_stream(reader)
            elif job.role == "both":
                await asyncio.gather(sink_stream(reader), source_stream(writer, job))
            else:
                writers.append(writer)
                if len(writers) == job.sessions:
                    start_senders(lambda sender: send_lines_by_streams(writers, sender))
                return
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=new_context(job), backlog=4096)
        announce(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())
