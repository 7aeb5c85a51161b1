"""The Bridge: threads, sessions and listeners wired together.  The only module that knows all the others."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import socket
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from OpenSSL import SSL

from bridge import codecs, events, forks
from bridge.acceptor import Acceptor
from bridge.addresses import Place, connected_to, host_alone, listening_socket, resolve, take_over
from bridge.context import Context
from bridge.coordinator import Channel
from bridge.crew import CROWDED, Crew
from bridge.crossing import Registry, Tally, deadline_after, nobody, time_left
from bridge.dialer import show_address
from bridge.engine import SessionInfo
from bridge.errors import (
    BridgeClosed,
    ConfigurationError,
    ConnectTimeout,
    LimitExceeded,
    OperationTimeout,
    SessionClosed,
    words,
)
from bridge.inbox import Inbox, ReadCredit, SessionInbox
from bridge.limits import Limits, Timeouts, check_flags, check_timeout
from bridge.listener import Listener
from bridge.outbox import Outbox
from bridge.poll import check_unpatched
from bridge.session import Session
from bridge.stream import Stream
from bridge.terms import Ending, Plan
from bridge.threads import before_waiting, let_through
from bridge.totals import Account, Totals, total
from bridge.transport import Transport

CodecFactory = Callable[[], "codecs.Codec[Any]"]
AnyContext = Context | SSL.Context
T = TypeVar("T")

EXIT_SECONDS = 3.0
"""How long a Bridge that was never closed may delay the end of the interpreter, for what was sent to leave."""
LAST_SECOND = 1.0
"""What its threads have after that; one that a codec keeps busy is not waited for."""

_CLOSED = "this Bridge is closed; make a new one"
_names = itertools.count(1)
_live: weakref.WeakSet[Bridge] = weakref.WeakSet()


@dataclasses.dataclass(frozen=True)
class SessionSnapshot:
    """What one session is doing now."""

    name: str
    worker: str
    """The thread that owns it; of a leased one, that which goes on when nobody calls."""
    state: str
    wants: dict[str, str]
    """For each OpenSSL call under way, what it waits for: ``{"read": "read", "write": "read"}``."""
    ages: dict[str, float]
    """And for how many seconds it has waited, since it was last tried."""
    seconds: float
    """For how long it has been in this state."""
    received: int
    """Bytes of plaintext that came, ever."""
    sent: int
    """Bytes of plaintext that the kernel took, ever."""
    inbox_bytes: int
    """Received, and not yet taken by the application."""
    outbox_bytes: int
    """Sent, and not yet taken by the kernel."""


@dataclasses.dataclass(frozen=True)
class ListenerSnapshot:
    """What one listener is doing now."""

    address: str
    handshakes: int
    """Clients whose handshake is under way, or has failed and whose socket is not closed yet."""
    waiting: int
    """Sessions that nobody has accepted yet; with a shared inbox, the messages in it."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a Bridge is doing now."""

    sessions: tuple[SessionSnapshot, ...]
    workers: tuple[str, ...]
    wants: dict[tuple[str, str], int]
    """How often OpenSSL answered each call with each want, over all sessions that have ended or live."""
    inbox_bytes: int
    """Of these sessions, and, to within 4 KB each, of those that have ended and not all of which is taken yet."""
    outbox_bytes: int
    listeners: tuple[ListenerSnapshot, ...] = ()


class Bridge(forks.Handle):
    """A coordinator thread, *workers* worker threads, and the sessions they own.

    *workers*: None means one a processor core, at most 4.  The threads start here and end with `close`; they
    are daemons, and a Bridge that was never closed is closed at exit.  One that is forgotten, as are its sessions, and
    that has no listener and no stream which is not closed, ends its threads, with a ResourceWarning.  Any thread may
    call anything.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        timeouts: Timeouts | None = None,
        limits: Limits | None = None,
        start: bool = True,
    ) -> None:
        check_unpatched()
        check_flags(start=start)
        if workers is None:
            workers = min(4, os.cpu_count() or 1)
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ConfigurationError(f"workers must be a positive whole number, not {workers!r}")
        self._timeouts = _instance("timeouts", timeouts, Timeouts) or Timeouts()
        self._limits = _instance("limits", limits, Limits) or Limits()
        self._born = forks.current
        self._closers: list[list[threading.Thread]] = []  # who calls `close`; the first does it
        self._inbox_tally = Tally(self._limits.total_bytes)
        self._outbox_tally = Tally(self._limits.total_bytes)
        # Clients' sessions that are over, and whose sockets are not closed yet.
        self._lingering = Tally(2**63)
        self._listeners: Registry[Listener] = Registry()
        self._streams: Registry[Stream] = Registry()
        self._crew = Crew(workers, self._streams)
        self._coordinator, self._workers = self._crew.coordinator, self._crew.workers
        self._channels = self._crew.channels
        if start:
            _live.add(self)
            self._crew.start()

    # Sessions.

    def connect(
        self,
        address: Place,
        context: AnyContext,
        *,
        server_hostname: str | None = None,
        codec: CodecFactory = codecs.Raw,
        inbox: Inbox | None = None,
        timeout: float | None = None,
        timeouts: Timeouts | None = None,
        limits: Limits | None = None,
        wait: bool = True,
    ) -> Session:
        """A client session to *address*, ``(host, port)`` or the path of a Unix socket, its handshake done.

        *address* may be all that a listener's can: also bytes, ``"\\0"`` and an abstract name, or four items of IPv6;
        and a path without a slash.
        *server_hostname* is who the peer must prove to be, and goes into SNI; by default the host of
        *address*.  *timeout* is total, in seconds, name resolution included (which happens on this thread and
        cannot be interrupted); `Timeouts.connect` and `Timeouts.handshake` hold besides.
        With ``wait=False`` returns before the handshake: messages sent meanwhile leave after it, and if it
        fails `recv` says why, or the shared inbox that the session has ended.

        Raises at once, also with ``wait=False``: ConfigurationError for unusable arguments, OSError for an unknown
        host, LimitExceeded, BridgeClosed, ForkedError, and whatever *codec* raises as it is called.  Then, for TCP:
        ConnectFailed, ConnectTimeout (also if *timeout* ends in the handshake); for the handshake: HandshakeTimeout,
        CertificateError, HostnameMismatch, NotTLS, TLSError, and PeerReset or Truncated if the peer resets the
        connection or hangs up; SessionClosed if the Bridge is closed meanwhile.  All but *codec*'s own are
        a BridgeError or an OSError.
        """
        self._check_open()
        check_flags(wait=wait)
        deadline = deadline_after(check_timeout("timeout", timeout))
        config = Context.adopt(context, server_side=False)
        host, addresses = resolve(address)
        name = host if server_hostname is None else server_hostname
        _check_name(config, name, address)
        plan = Plan(
            context=config,
            server_hostname=name,
            timeouts=self._nearest_timeouts(timeouts),
            addresses=addresses,
            awaited=deadline if wait else None,
            resume_key=(name, addresses[0][4]),
            peer=show_address(address),
        )
        session = self._make(plan, codec, inbox, limits, "to", given=not wait)
        return _opened(session, deadline, timeout) if wait else session

    def adopt(
        self,
        sock: socket.socket,
        context: AnyContext,
        *,
        server_hostname: str | None = None,
        server_side: bool | None = None,
        codec: CodecFactory = codecs.Raw,
        inbox: Inbox | None = None,
        timeout: float | None = None,
        timeouts: Timeouts | None = None,
        limits: Limits | None = None,
        wait: bool = True,
    ) -> Session:
        """A session over *sock*, which is connected already: after STARTTLS, from an accept loop, from a parent.

        Takes the socket over: *sock* is detached (``fileno() == -1``), since two owners of one descriptor
        cannot be made safe.  *server_side* says which side we are; by default the context knows, but an
        `OpenSSL.SSL.Context` of your own does not.  The rest is as for `connect`.

        Raises what `connect` raises, but for OSError and ConnectFailed.  A socket that was taken over is closed then.
        """
        self._check_open()
        check_flags(wait=wait)
        deadline = deadline_after(check_timeout("timeout", timeout))
        config, server_side = _sided(context, server_side)
        if not server_side:
            config.peer_name(server_hostname)
        peer = show_address(connected_to(sock))
        plan = Plan(
            context=config,
            server_hostname=server_hostname,
            timeouts=self._nearest_timeouts(timeouts),
            sock=sock,
            resume_key=(server_hostname,) if server_hostname is not None else None,
            peer=peer,
        )
        session = self._make(plan, codec, inbox, limits, "over", given=not wait)
        return _opened(session, deadline, timeout) if wait else session

    def stream(
        self,
        sock: socket.socket,
        context: AnyContext,
        *,
        server_hostname: str | None = None,
        server_side: bool | None = None,
        timeouts: Timeouts | None = None,
        resume: SSL.Session | None = None,
        owner: Callable[[], object] = nobody,
        leaving: Callable[[Stream], object] = nobody,
    ) -> Stream:
        """A session over *sock* as a stream of bytes, worked by the threads that call it: for look-alikes of sockets.

        As `adopt`, but nothing has been sent yet: the handshake starts with the first call.  *resume* is what
        `Stream.session` gave; callbacks find *owner* on their connection's record.  *leaving* is called with the
        stream, by whatever thread, when its descriptor is about to be closed, for who knows it by its number; never
        if `unwrap` has handed it back.  To be closed by `Stream.close`.
        """
        self._check_open()
        config, server_side = _sided(context, server_side)
        if not server_side:
            config.peer_name(server_hostname)
        peer = show_address(connected_to(sock))
        worker = self._crew.place()
        plan = Plan(
            context=config,
            server_hostname=server_hostname,
            timeouts=self._nearest_timeouts(timeouts),
            sock=take_over(sock),
            peer=peer,
            resume=resume,
            owner=owner,
        )
        name = f"{next(_names)} over {plan.peer}"
        stream = Stream(name, plan, worker, self._on_gone, leaving)
        try:
            self._count_in(self._streams, stream, None)
        except BridgeClosed:
            stream.close()
            raise
        return stream

    def listen(
        self,
        address: Place | socket.socket,
        context: AnyContext,
        *,
        codec: CodecFactory = codecs.Raw,
        inbox: Inbox | None = None,
        timeouts: Timeouts | None = None,
        limits: Limits | None = None,
    ) -> Listener:
        """Listen on *address*: ``(host, port)``, the path of a Unix socket, or a bound socket to take over.

        The host ``""`` is every interface of IPv4.  For IPv6 besides, pass
        ``socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)``.  A path has a slash, as in
        ``"./name"``, or it might be meant for a host.  A Unix socket may have an abstract name: ``"\\0"``, then that.
        The file of a path is removed when the listener is closed; that of a bound socket is its user's.

        Clients' handshakes are done by the workers, `Limits.handshakes` at a time; one that fails is
        logged (``handshake.failed``) and never seen here.  With *inbox* the sessions deliver there; without,
        the listener hands them out.  Raises ConfigurationError for unusable arguments, OSError (naming the
        address) if it cannot be had, LimitExceeded, BridgeClosed, ForkedError, and whatever *codec* raises as it is
        called, once, to see what it makes.
        """
        self._check_open()
        config = Context.adopt(context, server_side=True)
        timeouts = self._nearest_timeouts(timeouts)
        bounds = _instance("limits", limits, Limits) or self._limits
        codecs.made_by(codec)
        _check_inbox(inbox)
        worker = self._crew.place()
        sock, path = listening_socket(address, bounds.backlog)
        shown = show_address(sock.getsockname())

        def stop(timeout: float | None) -> None:
            worker.post(acceptor, "end", SessionClosed("the listener is closed"))
            if self._crew.serves() and not self._crew.is_here():
                with contextlib.suppress(OperationTimeout):
                    listener.gone.wait(timeout, "close")

        listener = Listener(sock.getsockname(), config, inbox, stop)

        on_open = functools.partial(self._on_client, listener)
        on_closed = functools.partial(self._on_client_closed, listener)
        on_gone = functools.partial(self._on_client_gone, listener)

        def admit(accepted: socket.socket, address: Any) -> None:
            peer = show_address(address or "")  # none on macOS if it has gone already
            plan = Plan(listener.context, server_hostname=None, timeouts=timeouts, sock=accepted, peer=peer)
            self._admit(listener, plan, codec, bounds, on_open, on_closed, on_gone)

        def closed() -> None:
            self._listeners.remove(listener)
            listener._finished()

        acceptor = Acceptor(sock, path, shown, admit, lambda: self._refuses(listener, bounds), closed)
        try:
            self._count_in(self._listeners, listener, inbox)
        except BridgeClosed:
            acceptor.drop()
            raise
        events.info("listener.started", address=shown)
        worker.post(acceptor, "start")
        return listener

    # Looking and ending.

    def snapshot(self) -> Snapshot:
        """What every session is doing now.  Cheap; any thread; takes no part in anything."""
        forks.check(self._born)
        now = time.monotonic()
        sessions = []
        channels = list(self._channels)
        left_behind = self._inbox_tally.used - sum(c.credit.reported + c.credit.kept for c in channels)
        seen = [(c.name, c.worker.name, c.transport.describe()) for c in channels]
        seen += [(stream.name, stream.worker, stream.describe()) for stream in self._streams]
        for name, worker, doing in seen:
            seconds = max(0.0, now - doing.pop("since"))
            sessions.append(SessionSnapshot(name, worker, seconds=seconds, **doing))
        return Snapshot(
            sessions=tuple(sessions),
            workers=tuple(worker.name for worker in self._workers),
            wants=self.totals().wants,
            inbox_bytes=sum(session.inbox_bytes for session in sessions) + max(0, left_behind),
            outbox_bytes=sum(session.outbox_bytes for session in sessions),
            listeners=tuple(
                ListenerSnapshot(show_address(one.address), one.handshakes.used, one.waiting())
                for one in self._listeners
            ),
        )

    def totals(self) -> Totals:
        """What all sessions have done, since the beginning.  As cheap as `snapshot`; any thread."""
        forks.check(self._born)
        return total(self._accounts())

    def close(self, timeout: float | None = None) -> None:
        """Close listeners, then all sessions politely, then end the threads.  Idempotent.

        The sessions have *timeout* seconds altogether (None: their own timeouts); what is not closed by then
        is aborted.  If an exception ends the `with` of a Bridge, or the program without this, what was sent still
        leaves, but no close_notify follows: the peers are not to take that for the end.
        """
        self._close(check_timeout("timeout", timeout), politely=True)

    def _close(self, timeout: float | None, politely: bool, give_up: float | None = None) -> None:
        """At the monotonic time *give_up* nothing is waited for any more."""
        forks.check(self._born)
        if self._crew.is_here():
            raise RuntimeError(
                "Bridge.close() was called by a thread of the Bridge itself, which it would wait for"
            )
        before_waiting()
        closer = [threading.current_thread()]
        try:
            self._closers.append(closer)
            if self._closers[0] is closer:
                self._close_sessions(timeout, politely, give_up)
                self._crew.stop()
            elif self._closers[0] == closer:  # a signal handler, in the middle of it
                return
            self._crew.join(give_up)
        except BaseException:  # Ctrl-C cut the politeness short
            if self._closers[:1] == [closer]:
                self._crew.stop()
            raise
        finally:
            closer.clear()
        _live.discard(self)

    def _close_sessions(self, timeout: float | None, politely: bool, give_up: float | None) -> None:
        deadline = deadline_after(timeout)
        for listener in self._listeners.seal():
            listener._close(time_left(give_up))
        channels, streams = self._channels.seal(), self._streams.seal()
        for channel in channels:
            self._coordinator.close(channel, timeout, politely)
        for stream in streams:
            stream.close(timeout, politely)
        if self._crew.serves():
            with contextlib.suppress(OperationTimeout):  # the workers cut short what lingers still
                for stream in streams:
                    stream.gone.wait(time_left(deadline), "close")
            try:
                reports = [channel.closed.wait(time_left(give_up), "close").report for channel in channels]
            except OperationTimeout:
                return
            events.debug(
                "bridge.closed", sessions=len(reports), unsent=sum(report.unsent for report in reports)
            )

    @property
    def closed(self) -> bool:
        """Whether `close` was called: nothing new can start."""
        return bool(self._closers) or self._crew.stopped

    def __enter__(self) -> Bridge:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close(None, politely=kind is None)

    def __del__(self) -> None:
        # May run in any thread, at any moment.  No session and no listener is left, or they would keep it alive.
        try:
            if not self._crew.serves() or forks.abandoned(self._born):
                return
        except AttributeError:
            return
        try:
            if not self._closers:  # or else its close was interrupted
                warnings.warn("a Bridge was forgotten, and ends its threads", ResourceWarning, source=self)
        finally:  # also where warnings are errors
            self._crew.stop()

    # Wiring.

    def _accounts(self) -> list[Account]:
        channels, left = self._channels.census()
        streams, gone = self._streams.census()
        accounts = [left, gone]
        accounts += [channel.transport.account(None) for channel in channels]
        accounts += [stream.account(None) for stream in streams]
        return accounts

    def _make(
        self,
        plan: Plan,
        codec: CodecFactory,
        inbox: Inbox | None,
        limits: Limits | None,
        how: str,
        given: bool,
    ) -> Session:
        bounds = _instance("limits", limits, Limits) or self._limits
        _check_inbox(inbox)
        if len(self._channels) >= self._most_sessions():
            raise self._full()
        session = self._wire(plan, codec, inbox, bounds, how)
        session._channel.given = given
        self._launch(session._channel)
        return session

    def _wire(
        self, plan: Plan, codec: CodecFactory, inbox: Inbox | None, bounds: Limits, how: str
    ) -> Session:
        """One session and everything that hangs on it; nothing has started yet."""
        made = codecs.made_by(codec)
        worker = self._crew.place()
        if plan.sock is not None and how == "over":  # somebody's, until now
            plan = dataclasses.replace(plan, sock=take_over(plan.sock))
        coordinator = self._coordinator
        where = SessionInbox() if inbox is None else inbox  # one of the user's may be false while it is empty
        channel = Channel(f"{next(_names)} {how} {plan.peer}", made, where, coordinator)
        channel.worker = worker
        channel.outbox = Outbox(bounds.outbox_bytes, self._outbox_tally, channel.has_sent)
        channel.credit = ReadCredit(
            bounds.inbox_bytes,
            self._inbox_tally,
            channel.resume,
            channel.inbox,
            stepwise=getattr(made.decode, "__func__", None) is not codecs.Raw.decode,
            seat=worker.seat,
        )
        channel.transport = Transport(channel.name, plan, channel.outbox, channel.credit, channel.tell)
        channel.on_closed = self._on_closed
        session = Session(channel, coordinator, plan.timeouts, bounds)
        channel.handle = None if inbox is None else session
        try:
            self._count_in(self._channels, channel, inbox, self._most_sessions)
        except (BridgeClosed, LimitExceeded) as error:
            channel.outbox.close(SessionClosed(str(error)))
            if plan.sock is not None:
                plan.sock.close()
            raise
        return session

    def _most_sessions(self) -> int:
        """How many channels there may be."""
        return self._limits.sessions - self._lingering.used

    def _full(self) -> LimitExceeded:
        return LimitExceeded(f"Limits.sessions is reached: {self._limits.sessions} sessions are open")

    def _launch(self, channel: Channel) -> None:
        channel.worker.post(channel.transport, "start")

    def _admit(
        self,
        listener: Listener,
        plan: Plan,
        codec: CodecFactory,
        bounds: Limits,
        on_open: Callable[[Channel], None],
        on_closed: Callable[[Channel, Ending], None],
        on_gone: Callable[[Transport], None],
    ) -> None:
        """A worker: a client was accepted."""
        try:
            session = self._wire(plan, codec, listener.inbox, bounds, "from")
        except BridgeClosed:
            return
        except BaseException as error:
            # A codec factory of the user's: it costs this client, not the listener.  Or another listener was faster.
            events.warning(
                "listener.refused",
                address=show_address(listener.address),
                peer=plan.peer,
                cause=type(error).__name__,
                error=words(error),
            )
            assert plan.sock is not None
            plan.sock.close()
            let_through(error)
            return
        channel = session._channel
        channel.handle = session
        listener.handshakes.add(1)
        channel.on_open, channel.on_closed = on_open, on_closed
        channel.transport.on_gone = on_gone
        self._launch(channel)

    def _on_client(self, listener: Listener, channel: Channel) -> None:
        """The coordinator: a client's handshake is done."""
        listener.handshakes.add(-1)
        if channel.handle is not None:  # or it has been closed meanwhile
            listener._deliver(channel.handle)
        if listener.inbox is None:
            channel.forget_handle()

    def _on_client_closed(self, listener: Listener, channel: Channel, ending: Ending) -> None:
        """The coordinator: a client's session is over, or never began."""
        if not isinstance(channel.opened.peek(), SessionInfo):
            cause, peer = ending.cause, channel.transport.peer
            kind = type(cause).__name__
            events.info("handshake.failed", session=channel.name, peer=peer, cause=kind, error=str(cause))
        self._lingering.add(1)
        self._channels.remove(channel, channel.transport.account(ending))

    def _on_client_gone(self, listener: Listener, transport: Transport) -> None:
        """A worker: the socket of a client is closed.  One that failed has counted until now, while it lingered."""
        self._lingering.add(-1)
        if transport.shaken is None:
            listener.handshakes.add(-1)

    def _refuses(self, listener: Listener, bounds: Limits) -> str | None:
        """A worker: why no client is accepted just now."""
        if len(self._channels) >= self._most_sessions():
            return f"Limits.sessions is reached ({self._limits.sessions})"
        if listener.handshakes.used >= bounds.handshakes:
            return f"Limits.handshakes is reached ({bounds.handshakes})"
        if listener.inbox is None and listener.waiting() >= bounds.backlog:
            return f"Limits.backlog is reached: {bounds.backlog} sessions wait for accept()"
        if listener.inbox is not None and listener.inbox._ends >= self._limits.sessions:
            return f"of {self._limits.sessions} sessions in the shared inbox no handler has seen the end"
        if not self._crew.has_room():
            return CROWDED
        return None

    def _on_closed(self, channel: Channel, ending: Ending) -> None:
        """The coordinator: a session is over."""
        self._channels.remove(channel, channel.transport.account(ending))

    def _on_gone(self, stream: Stream, ending: Ending) -> None:
        """Any thread: a stream's socket is closed, or handed back."""
        self._streams.remove(stream, stream.account(ending))

    def _count_in(
        self,
        members: Registry[T],
        member: T,
        inbox: Inbox | None,
        most: Callable[[], float] = lambda: math.inf,
    ) -> None:
        """One more to be closed with the bridge, and where it delivers.

        BridgeClosed if it is too late, LimitExceeded if there are *most* already.
        """
        if inbox is not None:
            self._crew.feed(inbox)
        if self._crew.stopped:
            raise BridgeClosed(_CLOSED)
        if not members.add(member, most):
            raise BridgeClosed(_CLOSED) if members.sealed else self._full()

    def _check_open(self) -> None:
        forks.check(self._born)
        if self.closed:
            raise BridgeClosed(_CLOSED)

    def _nearest_timeouts(self, timeouts: Timeouts | None) -> Timeouts:
        return _instance("timeouts", timeouts, Timeouts) or self._timeouts


def _sided(context: AnyContext, server_side: bool | None) -> tuple[Context, bool]:
    if server_side is not None:
        check_flags(server_side=server_side)
    if isinstance(context, Context):
        server_side = context.server_side if server_side is None else server_side
    elif server_side is None:
        raise ConfigurationError(
            "an OpenSSL.SSL.Context does not say which side it is: pass server_side=True or False"
        )
    return Context.adopt(context, server_side=server_side), server_side


def _check_name(context: Context, name: str | None, address: Place) -> None:
    try:
        context.peer_name(name)
    except ConfigurationError as error:
        alone = host_alone(address)
        if name is not None or alone is None:
            raise
        raise ConfigurationError(
            f"{address!r} is taken for the path of a Unix socket; TCP takes (host, port), as ({alone!r}, 443).  "
            f"If it is a path, {error}"
        ) from None


def _opened(session: Session, deadline: float | None, timeout: float | None) -> Session:
    """*session*, its handshake done; whatever keeps it from that aborts it."""
    try:
        session._wait_open(time_left(deadline))
    except OperationTimeout:
        far = (
            "TCP is connected, and the handshake not done" if session.state == "handshaking" else "no TCP yet"
        )
        session.abort()
        raise ConnectTimeout(f"{session.name}: no TLS session within {timeout:g} seconds: {far}") from None
    except BaseException:
        session.abort()
        raise
    return session


def _check_inbox(inbox: Inbox | None) -> None:
    _instance("inbox", inbox, Inbox)
    if inbox is not None:
        inbox._check_process()


def _instance(name: str, value: Any, kind: type[Any]) -> Any:
    if value is not None and not isinstance(value, kind):
        raise ConfigurationError(f"{name} must be a bridge.{kind.__name__}, not {value!r}")
    return value


@atexit.register
def _close_forgotten() -> None:
    for forgotten in list(_live):
        if not forks.abandoned(forgotten._born):
            give_up = deadline_after(EXIT_SECONDS + LAST_SECOND)
            forgotten._close(EXIT_SECONDS, politely=False, give_up=give_up)
