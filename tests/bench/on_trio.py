"""The trio server: a task per connection, and two where it reads and writes at once."""

from __future__ import annotations

import contextlib

import trio
from blocking import new_context
from job import READ, SENDERS, Job, announce, lines

BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)


async def sink(stream: trio.SSLStream) -> None:
    while await stream.receive_some(READ):
        pass


async def source(stream: trio.SSLStream, job: Job) -> None:
    payload = job.payload
    with contextlib.suppress(*BROKEN):
        while True:
            await stream.send_all(payload)


async def send_lines(streams: list[tuple[trio.Lock, trio.SSLStream]], sender: int) -> None:
    """One sender of all sessions; two tasks must not send at once."""
    with contextlib.suppress(*BROKEN):
        for line in lines(sender):
            for lock, stream in streams:
                async with lock:
                    await stream.send_all(line)


async def serve(job: Job) -> None:
    streams: list[tuple[trio.Lock, trio.SSLStream]] = []

    async def talk(stream: trio.SSLStream, nursery: trio.Nursery) -> None:
        if job.role == "echo":
            async for data in stream:
                await stream.send_all(data)
        elif job.role == "source":
            await source(stream, job)
        elif job.role == "lines":
            await stream.do_handshake()
            streams.append((trio.Lock(), stream))
            if len(streams) == job.sessions:
                for sender in range(SENDERS):
                    nursery.start_soon(send_lines, streams, sender)
            await trio.sleep_forever()
        else:
            if job.role == "both":
                nursery.start_soon(source, stream, job)
            await sink(stream)

    async with trio.open_nursery() as nursery:

        async def handle(stream: trio.SSLStream) -> None:
            with contextlib.suppress(*BROKEN):
                async with stream:
                    await talk(stream, nursery)

        listeners = await nursery.start(
            lambda task_status: trio.serve_ssl_over_tcp(
                handle, 0, new_context(job), host="127.0.0.1", task_status=task_status
            )
        )
        announce(listeners[0].transport_listener.socket.getsockname()[1])


def serve_trio(job: Job) -> None:
    """Serves until the process ends."""
    trio.run(serve, job)
