"""cheroot, werkzeug and gunicorn with our contexts, and curl, openssl(1) and http.client as their clients."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import http.client
import inspect
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import KeyPair
from dropin_rig import ARRANGEMENTS, CONTROL, Arrangement, library
from peers import PATIENCE, Program, dial
from stubs import expected, spoken_by

pytestmark = [
    pytest.mark.usefixtures("default_bridge"),
    # cheroot answers in clear by a socket that the failed handshake has closed, and drops the writer with the answer.
    pytest.mark.filterwarnings(r"ignore:Exception ignored.*IOBase:pytest.PytestUnraisableExceptionWarning"),
]

MEGABYTE = random.Random(11).randbytes(1_000_000)
DIGEST = hashlib.sha256(MEGABYTE).hexdigest()

our_server = pytest.mark.parametrize(
    "arrangement", [one for one in ARRANGEMENTS if str(one) == "theirs-client-ours-server"], ids=str
)
"""For clients that are programs."""


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """Greets who comes by GET, and gives the digest of what comes by POST; says by what socket, if it can."""
    size = int(environ.get("CONTENT_LENGTH") or 0)
    body = environ["wsgi.input"].read(size) if size else b""
    digest = hashlib.sha256(body).hexdigest()
    answer = digest if environ["REQUEST_METHOD"] == "POST" else f"hello from {environ['PATH_INFO']}"
    sockets = [environ[name] for name in environ if name.endswith((".socket", ".connection"))]
    headers = [("Content-Type", "text/plain"), ("Content-Length", str(len(answer)))]
    headers += [("X-Socket", type(one).__module__) for one in sockets]
    start_response("200 OK", headers)
    return [answer.encode()]


# ── servers ──


@contextlib.contextmanager
def cheroot(side: str, identity: KeyPair, context: Any, directory: Path) -> Iterator[int]:
    """cheroot with its adapter for the stdlib's ssl, which is given our context."""
    wsgi, builtin = library("cheroot.wsgi"), library("cheroot.ssl.builtin")

    class Adapter(builtin.BuiltinSSLAdapter):  # type: ignore[misc,name-defined]
        """Also tells the application what socket it made."""

        def wrap(self, sock: Any) -> Any:
            wrapped, environ = super().wrap(sock)
            return wrapped, {**environ, "tests.socket": wrapped}

    server = wsgi.Server(("127.0.0.1", 0), application, numthreads=4, timeout=2)
    server.expiration_interval = 0.05  # how often it looks whether it was stopped
    server.ssl_adapter = Adapter(identity.certfile, identity.keyfile)
    server.ssl_adapter.context = context
    server.prepare()
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server.bind_addr[1]
    finally:
        server.stop()
        thread.join()
        gc.collect()  # what it has dropped shall not trouble later tests


@contextlib.contextmanager
def werkzeug(side: str, identity: KeyPair, context: Any, directory: Path) -> Iterator[int]:
    """werkzeug's threaded server, which wraps its listening socket."""
    serving = library("werkzeug.serving")
    server = serving.make_server("127.0.0.1", 0, application, threaded=True, ssl_context=context)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.port
    finally:
        server.shutdown()
        thread.join()


GUNICORN = """\
bind = "127.0.0.1:0"
worker_class = "gthread"
workers = 2
threads = 4
keepalive = 30
graceful_timeout = 10
control_socket_disable = True
certfile, keyfile = {certfile!r}, {keyfile!r}
"""
GUNICORN_HOOK = """
def ssl_context(conf, default_ssl_context_factory):
    {imported}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(conf.certfile, conf.keyfile)
    return context
"""


@contextlib.contextmanager
def gunicorn(side: str, identity: KeyPair, context: Any, directory: Path) -> Iterator[int]:
    """gunicorn, whose workers are forked and ask a hook for the context; it ends cleanly."""
    imported = "from bridge import ssl" if expected(side) == "ours" and not CONTROL else "import ssl"
    settings = GUNICORN + GUNICORN_HOOK.replace("{imported}", imported)
    with gunicorn_program((), settings, identity, directory) as port:
        yield port


@contextlib.contextmanager
def gunicorn_with_bridge(side: str, identity: KeyPair, context: Any, directory: Path) -> Iterator[int]:
    """gunicorn as it is, run with the bridge in the place of ssl; it ends cleanly."""
    runner = ("-m", "bridge", "run") if expected(side) == "ours" and not CONTROL else ()
    with gunicorn_program(runner, GUNICORN, identity, directory) as port:
        yield port


@contextlib.contextmanager
def gunicorn_program(
    runner: tuple[str, ...], settings: str, identity: KeyPair, directory: Path
) -> Iterator[int]:
    library("gunicorn")
    source = f"import hashlib\nfrom typing import Any, Callable\n\n\n{inspect.getsource(application)}"
    (directory / "app.py").write_text(source)
    configuration = directory / "gunicorn.conf.py"
    names = {"{certfile!r}": repr(identity.certfile), "{keyfile!r}": repr(identity.keyfile)}
    for name, value in names.items():
        settings = settings.replace(name, value)
    configuration.write_text(settings)
    options = ("-c", str(configuration), "--pythonpath", str(directory), "app:application")
    with Program(sys.executable, *runner, "-m", "gunicorn", *options) as program:
        listening = program.wait_for(r"Listening at: https://127\.0\.0\.1:(\d+) \((\d+)\)")
        try:
            program.wait_for(r"(?s)Booting worker.*Booting worker")
            yield int(listening[1])
        finally:
            os.kill(int(listening[2]), signal.SIGTERM)
            said = program.finish()
        assert program.status == 0, said
        assert "Traceback" not in said and "SIGKILL" not in said, said


def name_of(server: Any) -> str:
    name: str = server.__name__
    return name


SERVERS = [cheroot, werkzeug, gunicorn, gunicorn_with_bridge]
on_servers_that_keep_alive = pytest.mark.parametrize(
    "port", [server for server in SERVERS if server is not werkzeug], indirect=True, ids=name_of
)
"""werkzeug answers each request with "Connection: close"."""


@pytest.fixture(params=SERVERS, ids=name_of)
def port(
    request: pytest.FixtureRequest,
    arrangement: Arrangement,
    server_cert: KeyPair,
    server_context: Any,
    tmp_path: Path,
) -> Iterator[int]:
    """Where a server of each kind listens."""
    with request.param(arrangement.server, server_cert, server_context, tmp_path) as number:
        yield number


# ── http.client ──


@pytest.fixture
def connect(arrangement: Arrangement, client_context: Any, port: int) -> Callable[[], Any]:
    """Makes a context manager of a connection of http.client's."""

    @contextlib.contextmanager
    def connected() -> Iterator[http.client.HTTPSConnection]:
        connection = http.client.HTTPSConnection("localhost", port, timeout=PATIENCE, context=client_context)
        with contextlib.closing(connection):
            yield connection

    return connected


def get(connection: http.client.HTTPSConnection, path: str) -> tuple[str, str]:
    """The answer to a GET, and whose socket the server has."""
    connection.request("GET", path)
    with connection.getresponse() as response:
        assert response.status == 200
        module = response.headers["X-Socket"]
        return response.read().decode(), "ours" if module.startswith("bridge") else "theirs"


def post(connection: http.client.HTTPSConnection, body: bytes) -> str:
    """The answer to a POST."""
    connection.request("POST", "/", body)
    with connection.getresponse() as response:
        assert response.status == 200
        return response.read().decode()


@on_servers_that_keep_alive
def test_several_requests_go_over_one_connection(connect: Callable[[], Any]) -> None:
    with connect() as connection:
        connection.connect()
        kept = connection.sock
        for number in range(4):
            assert get(connection, f"/{number}")[0] == f"hello from /{number}"
            assert post(connection, MEGABYTE) == DIGEST
            assert connection.sock is kept


def test_a_connection_says_whose_it_is(connect: Callable[[], Any], arrangement: Arrangement) -> None:
    with connect() as connection:
        connection.connect()
        assert spoken_by(connection.sock) == expected(arrangement.client)
        assert get(connection, "/") == ("hello from /", "theirs" if CONTROL else arrangement.server)


def test_parallel_clients_are_all_served(connect: Callable[[], Any]) -> None:
    def visit(number: int) -> None:
        with connect() as connection:
            for _ in range(2):
                assert post(connection, MEGABYTE) == DIGEST
                assert get(connection, f"/{number}")[0] == f"hello from /{number}"

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(visit, range(6))) == [None] * 6


def test_a_client_in_clear_is_turned_away_and_the_server_lives_on(
    connect: Callable[[], Any], port: int
) -> None:
    for _ in range(3):
        with dial(("127.0.0.1", port)) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " not in heard_until_the_end(sock)
    with connect() as connection:
        assert get(connection, "/next")[0] == "hello from /next"


def test_a_client_that_leaves_in_the_middle_hurts_nobody(connect: Callable[[], Any], port: int) -> None:
    with connect() as connection:
        connection.putrequest("POST", "/")
        connection.putheader("Content-Length", str(len(MEGABYTE)))
        connection.endheaders(MEGABYTE[:1000])
    with dial(("127.0.0.1", port)) as sock:
        sock.sendall(b"\x16\x03\x01")
    with connect() as connection:
        assert get(connection, "/next")[0] == "hello from /next"


@our_server
def test_a_client_that_says_nothing_stalls_nobody(
    connect: Callable[[], Any], port: int, request: pytest.FixtureRequest
) -> None:
    """cheroot shakes hands in its accept loop, so there it is a stall of its own time-out, and no longer."""
    if CONTROL and "werkzeug" in request.node.name:
        pytest.skip("the stdlib's listening socket shakes hands in accept(), which has no time-out here")
    with dial(("127.0.0.1", port)), dial(("127.0.0.1", port)):
        with connect() as connection:
            assert get(connection, "/next")[0] == "hello from /next"


def heard_until_the_end(sock: socket.socket) -> bytes:
    """All that comes until the other side is gone, with or without a word."""
    heard = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(1 << 16):
            heard += data
    return heard


# ── programs ──


@our_server
@on_servers_that_keep_alive
def test_curl_asks_twice_over_one_connection(curl: str, port: int, ca_file: str) -> None:
    said = run_curl(curl, ca_file, "-w", " %{num_connects}\n", *(url(port, path) for path in ("a", "b")))
    assert said == "hello from /a 1\nhello from /b 0\n"


@our_server
def test_curl_posts_a_megabyte(curl: str, port: int, ca_file: str, tmp_path: Path) -> None:
    file = tmp_path / "megabyte"
    file.write_bytes(MEGABYTE)
    assert run_curl(curl, ca_file, "--data-binary", f"@{file}", url(port, "")) == DIGEST


def url(port: int, path: str) -> str:
    return f"https://localhost:{port}/{path}"


def run_curl(curl: str, ca_file: str, *arguments: str) -> str:
    """What curl prints."""
    command = (curl, "--silent", "--show-error", "--noproxy", "*", "--cacert", ca_file, *arguments)
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@our_server
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_s_client_gets_an_answer(openssl: str, version: str, port: int, ca_file: str) -> None:
    trust = ("-CAfile", ca_file, "-verify_return_error", "-verify_hostname", "localhost")
    command = (openssl, "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "localhost", *trust)
    with Program(*command, version, "-quiet") as client:
        client.put(b"GET /here HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert "hello from /here" in client.finish()
