"""TLS for threaded programs: few threads own all sessions, and nobody else ever sees a WANT_*.

Who may touch what, and under which lock::

                                     application          coordinator     worker (of that session)  lock
    Bridge, Session, Stream, queues  call, any thread     ·               ·                         ·
    SSL.Context                      build, freeze        ·               read                      ·
    coordinator's mailbox            put                  take            put; take, if idle        Mailbox._lock
    channels, codecs' decode         a record it read     OWN             a batch, if idle          Coordinator._lock
    codecs' encode                   call, any thread     ·               ·                         ·
    session inbox (messages)         get; put its record  put             put, if idle              Inbox._lock
    send credit (outbox)             take; hold           take bytes      give back                 Outbox._lock
    read credit                      take; give back      charge          take; charge, if idle     Inbox._lock
    worker's mailbox + doorbell      put, ring            put, ring       take, clear               Mailbox._lock
    the seat at a worker's poll      take, if free        ·               sit; leave; take          Seat._lock
    a Stream's lease                 take, for a turn     ·               take, for a turn          Lease.lock
    SSL.Connection, socket           a record, if quiet   ·               OWN (create … close)      Transport.lock
    poll set                         lend, leave          ·               OWN                       Transport.lock
    state, deadlines                 look; those of I/O   ·               OWN                       Transport.lock
    SessionInfo (peer, ALPN, …)      read (frozen)        pass on         make once                 ·

The worker's column is the session's owner: the worker it was given to, and for a `Stream` whoever holds its lease, a
calling thread or its worker, for the length of a turn; never two (see `bridge.lease`).  The worker is who sits in its
seat: its own thread, or a handler that would only wait for what it reads (see `bridge.seat`); never two.

Owners lend what is theirs to whoever is there, for one turn and under a lock, because a hand-over to a thread that
sleeps costs more than the work: a worker handles what it has read itself if the coordinator has nothing to do
(`Coordinator.hand_over`), a thread that sends an answer or a large message writes it itself if its session is at rest
(`Channel.answer`), and one that waits for a message then reads it itself (`Channel.attend`): it comes to the codec with
its session locked and all that was read before decoded, and so alone.  A socket may stay lent while its receiver is
away for a moment; the worker makes rounds, and takes back what it finds alone (`Worker.leave`).

Three rules: everything mutable has one owner, and what crosses is frozen and goes through a queue; only
application threads wait for room; no correctness rests on the GIL.
"""

from bridge import codecs
from bridge.bridge import Bridge, ListenerSnapshot, SessionSnapshot, Snapshot
from bridge.context import Context, client_context, server_context
from bridge.engine import SessionInfo
from bridge.errors import (
    BridgeClosed,
    BridgeError,
    CertificateError,
    CloseTimeout,
    CodecError,
    ConfigurationError,
    ConnectFailed,
    ConnectTimeout,
    DeadlineExceeded,
    EndOfStream,
    ForkedError,
    HandshakeTimeout,
    HostnameMismatch,
    IdleTimeout,
    LimitExceeded,
    MessageTooLarge,
    NotTLS,
    OperationTimeout,
    PeerReset,
    ReceiveTimeout,
    SendTimeout,
    SessionAborted,
    SessionClosed,
    SessionEnded,
    SessionStalled,
    ShutDown,
    TLSError,
    Truncated,
    WouldBlock,
    WriteStalled,
)
from bridge.inbox import Inbox
from bridge.limits import Limits, Timeouts
from bridge.listener import Listener
from bridge.session import Session
from bridge.stream import Stream
from bridge.tap import TraceEvent
from bridge.terms import CloseReport
from bridge.totals import Totals
from bridge.tracing import Trace, trace

__version__ = "0.1.0"

__all__ = (
    "Bridge",
    "BridgeClosed",
    "BridgeError",
    "CertificateError",
    "CloseReport",
    "CloseTimeout",
    "CodecError",
    "ConfigurationError",
    "ConnectFailed",
    "ConnectTimeout",
    "Context",
    "DeadlineExceeded",
    "EndOfStream",
    "ForkedError",
    "HandshakeTimeout",
    "HostnameMismatch",
    "IdleTimeout",
    "Inbox",
    "LimitExceeded",
    "Limits",
    "Listener",
    "ListenerSnapshot",
    "MessageTooLarge",
    "NotTLS",
    "OperationTimeout",
    "PeerReset",
    "ReceiveTimeout",
    "SendTimeout",
    "Session",
    "SessionAborted",
    "SessionClosed",
    "SessionEnded",
    "SessionInfo",
    "SessionSnapshot",
    "SessionStalled",
    "ShutDown",
    "Snapshot",
    "Stream",
    "TLSError",
    "Timeouts",
    "Totals",
    "Trace",
    "TraceEvent",
    "Truncated",
    "WouldBlock",
    "WriteStalled",
    "client_context",
    "codecs",
    "server_context",
    "trace",
)
