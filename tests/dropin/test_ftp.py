"""ftplib.FTP_TLS: protected data connections, their session reuse, and a control connection that turns plain again."""

from __future__ import annotations

import contextlib
import ftplib
import io
import random
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import KeyPair
from dropin_rig import Arrangement, context_class, library
from peers import PATIENCE
from serving import OUR_CLIENT, Conversation, LineServer, is_of, serving

pytestmark = pytest.mark.usefixtures("default_bridge")

LARGE = random.Random(14).randbytes(700_000)
LINES = [f"line {number}" for number in range(2000)]
TEXT = "".join(f"{line}\r\n" for line in LINES).encode()


@contextlib.contextmanager
def pyftpdlib(home: Path, identity: KeyPair) -> Iterator[int]:
    """An FTP server by pyftpdlib, whose TLS is pyOpenSSL's, on the loop of a thread; its port."""
    ioloop = library("pyftpdlib.ioloop")  # first, for it silences the deprecation of asyncore
    handlers, servers = library("pyftpdlib.handlers"), library("pyftpdlib.servers")
    authorizers = library("pyftpdlib.authorizers")

    class Handler(handlers.TLS_FTPHandler):  # type: ignore[misc, name-defined]
        certfile, keyfile = identity.certfile, identity.keyfile
        tls_control_required = tls_data_required = True
        authorizer = authorizers.DummyAuthorizer()

    Handler.authorizer.add_user("alice", "secret", str(home), perm="elradfmw")
    loop, over = ioloop.IOLoop(), threading.Event()
    server = servers.FTPServer(("127.0.0.1", 0), Handler, ioloop=loop)

    def serve() -> None:
        while not over.is_set():
            loop.loop(timeout=0.05, blocking=False)
        server.close_all()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.address[1]
    finally:
        over.set()
        thread.join()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The directory that is served."""
    path = tmp_path / "home"
    path.mkdir()
    return path


class Client(ftplib.FTP_TLS):
    """Remembers its data connections; with *reuse* these go on with the session of the control connection."""

    def __init__(self, port: int, context: Any, reuse: bool = False) -> None:
        super().__init__(context=context, timeout=PATIENCE)
        self.reuse = reuse
        self.reused: list[bool | None] = []
        self.data_classes: set[type] = set()
        self.connect("localhost", port)
        self.login("alice", "secret")
        self.prot_p()

    def ntransfercmd(self, cmd: str, rest: int | str | None = None) -> tuple[Any, int | None]:
        """Open a data connection, and look at it."""
        if self.reuse:
            conn, size = ftplib.FTP.ntransfercmd(self, cmd, rest)
            control: Any = self.sock
            wrapped = self.context.wrap_socket(conn, server_hostname=self.host, session=control.session)
        else:
            wrapped, size = super().ntransfercmd(cmd, rest)  # type: ignore[assignment]
        self.reused.append(wrapped.session_reused)
        self.data_classes.add(type(wrapped))
        return wrapped, size


def transfer(client: Client) -> None:
    """Store and retrieve, bytes and lines."""
    for name, data in ("large", LARGE), ("empty", b""):
        assert client.storbinary(f"STOR {name}", io.BytesIO(data)).startswith("226")
        parts: list[bytes] = []
        assert client.retrbinary(f"RETR {name}", parts.append).startswith("226")
        assert b"".join(parts) == data
    client.storlines("STOR lines", io.BytesIO(TEXT))
    lines: list[str] = []
    client.retrlines("RETR lines", lines.append)
    assert lines == LINES


# ── pyftpdlib ──


@OUR_CLIENT
def test_files_and_listings_cross_protected_data_connections(
    arrangement: Arrangement, client_context: Any, tls_version: str, home: Path, server_cert: KeyPair
) -> None:
    client_context.minimum_version = client_context.maximum_version = version_of(tls_version)
    with pyftpdlib(home, server_cert) as port, Client(port, client_context) as client:
        assert isinstance(client.sock, ssl.SSLSocket)
        assert is_of(type(client.sock), arrangement.client)
        assert client.sock.version() == tls_version
        transfer(client)
        assert (home / "large").read_bytes() == LARGE
        listing: list[str] = []
        client.dir(listing.append)
        assert {line.split()[-1] for line in listing} == {"large", "empty", "lines"}
        assert sorted(client.nlst()) == ["empty", "large", "lines"]
        assert all(is_of(found, arrangement.client) for found in client.data_classes)
        assert len(client.reused) == 8
        assert client.pwd() == "/"


def version_of(name: str) -> ssl.TLSVersion:
    return ssl.TLSVersion[name.replace(".", "_")]


@OUR_CLIENT
def test_data_connections_go_on_with_the_session_of_the_control_connection(
    client_context: Any, tls_version: str, home: Path, server_cert: KeyPair
) -> None:
    client_context.minimum_version = client_context.maximum_version = version_of(tls_version)
    with pyftpdlib(home, server_cert) as port, Client(port, client_context, reuse=True) as client:
        transfer(client)
        assert client.reused == [True] * 6


@OUR_CLIENT
def test_a_transfer_that_is_cut_short_leaves_the_control_connection_usable(
    client_context: Any, home: Path, server_cert: KeyPair
) -> None:
    (home / "large").write_bytes(LARGE * 10)
    with pyftpdlib(home, server_cert) as port, Client(port, client_context) as client:
        with client.transfercmd("RETR large") as conn:
            assert conn.recv(1000)
        assert client.getmultiline()[:3] in ("226", "426")  # our close swallows some of what is under way
        assert client.nlst() == ["large"]
        transfer(client)


@OUR_CLIENT
def test_a_server_that_is_not_trusted_gets_no_password(
    arrangement: Arrangement, home: Path, server_cert: KeyPair
) -> None:
    suspicious = context_class(arrangement.client)(ssl.PROTOCOL_TLS_CLIENT)
    with pyftpdlib(home, server_cert) as port:
        with pytest.raises(ssl.SSLCertVerificationError):
            Client(port, suspicious)


# ── a server of our own ──


class Ftp(Conversation):
    """As much of an FTP server as FTP_TLS needs, with CCC, and files that are of the memory."""

    greeting = "220 ready"
    files: dict[str, bytes]

    def setup(self) -> None:
        super().setup()
        self.files = getattr(self, "files", {})

    def answer(self, line: str) -> bool:
        verb, _, argument = line.partition(" ")
        if verb == "AUTH":
            return self.say("234 go on") and self.start_tls()
        if verb == "PASV":
            return self.listen()
        if verb == "STOR":
            self.files[argument] = self.transfer(None)
            return self.say("226 stored")
        if verb == "RETR":
            self.transfer(self.files[argument])
            return self.say("226 sent")
        if verb == "CCC":
            return self.say("200 in clear from now on") and self.stop_tls()
        if verb == "QUIT":
            return self.say("221 bye") and False
        answers = {"USER": "331 and the password?", "PASS": "230 welcome", "PWD": '257 "/"'}
        return self.say(answers.get(verb, "200 fine"))

    def listen(self) -> bool:
        """For a data connection."""
        self.passive = socket.create_server(("127.0.0.1", 0))
        self.passive.settimeout(PATIENCE)
        high, low = divmod(self.passive.getsockname()[1], 256)
        return self.say(f"227 Entering Passive Mode (127,0,0,1,{high},{low})")

    def transfer(self, data: bytes | None) -> bytes:
        """Send *data*, or receive."""
        self.say("150 go on")
        with self.passive, self.passive.accept()[0] as plain:
            plain.settimeout(PATIENCE)
            with self.server.tls.wrap_socket(plain, server_side=True) as sock:
                if data is not None:
                    sock.sendall(data)
                received = b"" if data is not None else b"".join(iter(lambda: sock.recv(1 << 16), b""))
                sock.unwrap()
        return received

    def stop_tls(self) -> bool:
        """From now on in clear, and say so in the same segment as TLS says its last word, where that can be had."""
        cork = getattr(socket, "TCP_CORK", None)
        if cork is not None:
            self.request.setsockopt(socket.IPPROTO_TCP, cork, 1)
        self.request = self.request.unwrap()
        self.setup()
        self.say("220 this is in clear")
        if cork is not None:
            self.request.setsockopt(socket.IPPROTO_TCP, cork, 0)
        return True


@contextlib.contextmanager
def stub(context: Any) -> Iterator[LineServer]:
    with serving(LineServer(Ftp, context)) as server:
        yield server


def test_files_cross_protected_data_connections_of_a_threaded_server(
    arrangement: Arrangement, server_context: Any, client_context: Any
) -> None:
    with stub(server_context) as server:
        with Client(server.port, client_context) as client:
            transfer(client)
            assert all(is_of(found, arrangement.client) for found in client.data_classes)
        assert is_of(server.socket_class(), arrangement.server)
        assert server.failures.empty()


def test_data_connections_reuse_the_session_of_a_threaded_server(
    server_context: Any, client_context: Any, tls_version: str
) -> None:
    client_context.minimum_version = client_context.maximum_version = version_of(tls_version)
    with stub(server_context) as server, Client(server.port, client_context, reuse=True) as client:
        transfer(client)
        assert client.reused == [True] * 6


def test_commands_after_ccc_are_plain(
    arrangement: Arrangement, server_context: Any, client_context: Any, tls_version: str
) -> None:
    client_context.minimum_version = client_context.maximum_version = version_of(tls_version)
    with stub(server_context) as server:
        with Client(server.port, client_context) as client:
            assert is_of(type(client.sock), arrangement.client)
            assert client.pwd() == "/"
            assert client.ccc().startswith("200")
            assert client.getresp() == "220 this is in clear"
            assert client.pwd() == "/"
            for _ in range(3):
                assert client.sendcmd("NOOP") == "200 fine"
            transfer(client)
        assert server.failures.empty()
