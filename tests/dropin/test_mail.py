"""smtplib, imaplib and poplib: TLS from the first byte, and TLS that begins in the middle of a conversation."""

from __future__ import annotations

import contextlib
import imaplib
import poplib
import queue
import random
import smtplib
import ssl
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from dropin_rig import Arrangement, context_class, injection, library
from peers import PATIENCE
from serving import OUR_CLIENT, Conversation, LineServer, becomes_readable, is_of, serving

pytestmark = pytest.mark.usefixtures("default_bridge")

LINES = [
    *textwrap.wrap(random.Random(13).randbytes(150_000).hex(), 70),
    ".",
    "..a line that begins with dots",
    "",
    "the end",
]
MESSAGE = ("Subject: a long one\r\n\r\n" + "".join(f"{line}\r\n" for line in LINES)).encode()
IMPLICIT = pytest.mark.parametrize("implicit", [True, False], ids=["implicit-tls", "start-tls"])


# ── the servers ──


class Smtp(Conversation):
    """Takes messages."""

    greeting = "220 ready"

    def answer(self, line: str) -> bool:
        verb, _, argument = line.partition(" ")
        if verb.upper() == "EHLO":
            return self.say("250-localhost", "250 STARTTLS")
        if verb == "STARTTLS":
            return self.say("220 go on") and self.start_tls()
        if verb.upper() == "DATA":
            self.say("354 go on")
            body = list(iter(self.rfile.readline, b".\r\n"))
            self.server.received.put(b"".join(one.removeprefix(b".") for one in body))
        if verb.upper() == "QUIT":
            return self.say("221 bye") and False
        return self.say("250 fine") and self.part(argument)


class Imap(Conversation):
    """One mailbox with one message, and room for more."""

    greeting = "* OK ready"

    def answer(self, line: str) -> bool:
        tag, verb, *arguments = line.split()
        if verb == "CAPABILITY":
            self.say("* CAPABILITY IMAP4rev1 STARTTLS")
        elif verb == "STARTTLS":
            return self.say(f"{tag} OK done") and self.start_tls()
        elif verb == "SELECT":
            self.say("* 1 EXISTS")
        elif verb == "FETCH":
            self.say(f"* 1 FETCH (RFC822 {{{len(MESSAGE)}}}")
            self.wfile.write(MESSAGE)
            self.say(")")
        elif verb == "APPEND":
            self.say("+ go on")
            self.server.received.put(self.rfile.read(int(arguments[-1].strip("{}"))))
            self.rfile.readline()
        elif verb == "LOGOUT":
            return self.say("* BYE", f"{tag} OK done") and False
        return self.say(f"{tag} OK done") and self.part(arguments[0] if arguments else "")


class Pop(Conversation):
    """A mailbox with one message."""

    greeting = "+OK ready"

    def answer(self, line: str) -> bool:
        verb, _, argument = line.partition(" ")
        if verb == "CAPA":
            return self.say("+OK", "STLS", "USER", ".")
        if verb == "STLS":
            return self.say("+OK") and self.start_tls()
        if verb == "STAT":
            return self.say(f"+OK 1 {len(MESSAGE)}")
        if verb == "RETR":
            text = MESSAGE.decode().removesuffix("\r\n").split("\r\n")
            return self.say("+OK", *(f".{one}" if one.startswith(".") else one for one in text), ".")
        if verb == "QUIT":
            return self.say("+OK") and False
        return self.say("+OK") and self.part(argument)


@contextlib.contextmanager
def line_server(conversation: type[Conversation], context: Any, implicit: bool) -> Iterator[LineServer]:
    """A server of *conversation*, in TLS from the beginning or when it is asked to."""
    server = LineServer(conversation, context)
    with serving(server, context if implicit else None):
        yield server


# ── the clients ──


def open_smtp(port: int, context: Any, implicit: bool) -> smtplib.SMTP:
    """A client of smtplib, in TLS."""
    if implicit:
        return smtplib.SMTP_SSL("localhost", port, "client", timeout=PATIENCE, context=context)
    client = smtplib.SMTP("localhost", port, "client", timeout=PATIENCE)
    client.starttls(context=context)
    return client


def open_imap(port: int, context: Any, implicit: bool) -> imaplib.IMAP4:
    """A client of imaplib, in TLS."""
    if implicit:
        return imaplib.IMAP4_SSL("localhost", port, timeout=PATIENCE, ssl_context=context)
    client = imaplib.IMAP4("localhost", port, timeout=PATIENCE)
    client.starttls(context)
    return client


def open_pop(port: int, context: Any, implicit: bool) -> poplib.POP3:
    """A client of poplib, in TLS."""
    if implicit:
        return poplib.POP3_SSL("localhost", port, timeout=PATIENCE, context=context)
    client = poplib.POP3("localhost", port, timeout=PATIENCE)
    client.stls(context)
    return client


Open = Callable[[int, Any, bool], Any]
PROTOCOLS = pytest.mark.parametrize(
    ("conversation", "open_client", "quit_client"),
    [
        pytest.param(Smtp, open_smtp, smtplib.SMTP.quit, id="smtp"),
        pytest.param(Imap, open_imap, imaplib.IMAP4.logout, id="imap"),
        pytest.param(Pop, open_pop, poplib.POP3.quit, id="pop"),
    ],
)


# ── messages ──


@IMPLICIT
def test_smtplib_delivers_messages(
    server_context: Any, client_context: Any, arrangement: Arrangement, implicit: bool
) -> None:
    with line_server(Smtp, server_context, implicit) as server:
        with open_smtp(server.port, client_context, implicit) as client:
            assert is_of(type(client.sock), arrangement.client)
            for _ in range(2):
                client.sendmail("alice@example.org", ["bob@example.org"], MESSAGE)
                assert server.received.get(timeout=PATIENCE) == MESSAGE
        assert is_of(server.socket_class(), arrangement.server)
        assert server.failures.empty()


@IMPLICIT
def test_imaplib_appends_and_fetches_literals(
    server_context: Any, client_context: Any, arrangement: Arrangement, implicit: bool
) -> None:
    with line_server(Imap, server_context, implicit) as server:
        with open_imap(server.port, client_context, implicit) as client:
            assert is_of(type(client.sock), arrangement.client)
            client.login("alice", "secret")
            assert client.select() == ("OK", [b"1"])
            client.append("INBOX", "", "", MESSAGE)
            assert server.received.get(timeout=PATIENCE) == MESSAGE
            assert client.fetch("1", "(RFC822)")[1][0][1] == MESSAGE  # type: ignore[index]
        assert is_of(server.socket_class(), arrangement.server)
        assert server.failures.empty()


@IMPLICIT
def test_poplib_retrieves_a_message(
    server_context: Any, client_context: Any, arrangement: Arrangement, implicit: bool
) -> None:
    with line_server(Pop, server_context, implicit) as server:
        client = open_pop(server.port, client_context, implicit)
        assert is_of(type(client.sock), arrangement.client)
        client.user("alice")
        client.pass_("secret")
        assert client.stat() == (1, len(MESSAGE))
        assert b"".join(line + b"\r\n" for line in client.retr(1)[1]) == MESSAGE
        client.quit()
        assert is_of(server.socket_class(), arrangement.server)
        assert server.failures.empty()


# ── contexts of their own, refusals, and sudden ends ──


@IMPLICIT
@PROTOCOLS
def test_a_client_without_a_context_builds_one_that_trusts_everybody(
    server_context: Any,
    arrangement: Arrangement,
    conversation: type[Conversation],
    open_client: Open,
    quit_client: Callable[[Any], Any],
    implicit: bool,
) -> None:
    with line_server(conversation, server_context, implicit) as server, injection(arrangement.client):
        client = open_client(server.port, None, implicit)
        assert is_of(type(client.sock), arrangement.client)
        assert client.sock.getpeercert() == {}
        assert client.sock.version() == "TLSv1.3"
        quit_client(client)


@IMPLICIT
@PROTOCOLS
def test_a_client_refuses_a_server_it_does_not_trust(
    server_context: Any,
    arrangement: Arrangement,
    conversation: type[Conversation],
    open_client: Open,
    quit_client: Callable[[Any], Any],
    implicit: bool,
) -> None:
    suspicious = context_class(arrangement.client)(ssl.PROTOCOL_TLS_CLIENT)
    with line_server(conversation, server_context, implicit) as server:
        with pytest.raises(ssl.SSLCertVerificationError, match="CERTIFICATE_VERIFY_FAILED"):
            open_client(server.port, suspicious, implicit)


@pytest.mark.parametrize("how", ["close", "reset"])
@IMPLICIT
@PROTOCOLS
def test_quitting_a_dead_connection_ends_in_the_error_of_the_library_and_closes_it(
    server_context: Any,
    client_context: Any,
    conversation: type[Conversation],
    open_client: Open,
    quit_client: Callable[[Any], Any],
    implicit: bool,
    how: str,
) -> None:
    errors = (
        smtplib.SMTPServerDisconnected,
        imaplib.IMAP4.abort,
        poplib.error_proto,
        ConnectionError,
        ssl.SSLEOFError,
    )
    with line_server(conversation, server_context, implicit) as server:
        client = open_client(server.port, client_context, implicit)
        tell_to_part(client, how)
        server.may_part.set()  # not earlier: a reset can overtake the answer
        server.socket_class()
        assert becomes_readable(client.sock)
        with pytest.raises(errors):
            quit_client(client)
        end = client.shutdown if isinstance(client, imaplib.IMAP4) else client.close
        end()  # must not fail


def tell_to_part(client: Any, how: str) -> None:
    """Send what a `Conversation` answers and then ends *how*."""
    if isinstance(client, smtplib.SMTP):
        assert client.docmd("NOOP", how) == (250, b"fine")
    elif isinstance(client, imaplib.IMAP4):
        assert client.login(how, "secret")[0] == "OK"
    else:
        assert client.user(how) == b"+OK"


# ── SMTP, by aiosmtpd ──


class Mailbox:
    """Keeps what aiosmtpd receives."""

    def __init__(self) -> None:
        self.contents: queue.Queue[bytes] = queue.Queue()

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        """Take the message in, and say by what it came."""
        self.contents.put(envelope.content)
        return "250 taken"


@contextlib.contextmanager
def aiosmtpd(mailbox: Mailbox, **more: Any) -> Iterator[int]:
    """An SMTP server on the event loop of a thread; its port."""

    class Controller(library("aiosmtpd.controller").Controller):  # type: ignore[misc]
        def _trigger_server(self) -> None:
            self.port = self.server.sockets[0].getsockname()[1]
            super()._trigger_server()

    controller = Controller(mailbox, hostname="127.0.0.1", port=0, **more)
    controller.start()
    try:
        yield controller.port
    finally:
        controller.stop()


@OUR_CLIENT
@IMPLICIT
def test_smtplib_delivers_messages_to_aiosmtpd(
    server_context: Any, client_context: Any, arrangement: Arrangement, implicit: bool
) -> None:
    tls = {"ssl_context": server_context} if implicit else {"tls_context": server_context}
    mailbox = Mailbox()
    with aiosmtpd(mailbox, require_starttls=not implicit, **tls) as port:
        with open_smtp(port, client_context, implicit) as client:
            assert is_of(type(client.sock), arrangement.client)
            for _ in range(2):
                assert client.sendmail("alice@example.org", ["bob@example.org"], MESSAGE) == {}
                assert mailbox.contents.get(timeout=PATIENCE) == MESSAGE
