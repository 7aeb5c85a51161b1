"""The HTTP clients people use, http.client, urllib.request, urllib3 and requests, and a threaded HTTP server."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import http.server
import io
import random
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from conftest import KeyPair, write_key_pair
from dropin_rig import Arrangement, injection, library, make_client_context, make_server_context
from peers import PATIENCE, Background, receive_exactly
from serving import Watched, becomes_readable, is_of, serving

pytestmark = pytest.mark.usefixtures("default_bridge")

SMALL = b"a few bytes"
LARGE = random.Random(11).randbytes(4_000_000)
SHORT = 0.3
"""A time-out that is meant to expire."""


class Site(http.server.BaseHTTPRequestHandler):
    """A few pages, most of them peculiar; what is posted is answered by its SHA-256."""

    protocol_version = "HTTP/1.1"
    timeout = PATIENCE
    server: HTTPServer

    def do_GET(self) -> None:
        """The page of that name."""
        self.server.classes.add(type(self.connection))
        pages: dict[str, Callable[[], None]] = {
            "/small": functools.partial(self.reply, SMALL),
            "/large": functools.partial(self.reply, LARGE),
            "/last": functools.partial(self.reply, LARGE, Connection="close"),
            "/unmeasured": self.unmeasured,
            "/dropping": self.dropping,
            "/silent": self.silent,
        }
        pages[self.path]()

    def do_POST(self) -> None:
        """The digest of what was posted."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(digest(body).encode())

    def reply(self, body: bytes, **headers: str) -> None:
        """A whole response."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def unmeasured(self) -> None:
        """A body that ends where the connection does."""
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(LARGE)

    def dropping(self) -> None:
        """A response after which the connection is closed, though nothing was said of that."""
        self.reply(SMALL)
        self.close_connection = True

    def silent(self) -> None:
        """Nothing at all, until the client has lost its patience."""
        self.rfile.read(1)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class HTTPServer(Watched, http.server.ThreadingHTTPServer):
    """The site, and the classes of the sockets it was served over."""

    def __init__(self) -> None:
        self.classes: set[type] = set()
        super().__init__(("127.0.0.1", 0), Site)

    @property
    def port(self) -> int:
        """Where it listens."""
        port: int = self.server_address[1]
        return port

    def url(self, page: str) -> str:
        """The address of *page*."""
        return f"https://localhost:{self.port}/{page}"


@pytest.fixture
def server(arrangement: Arrangement, server_context: Any) -> Iterator[HTTPServer]:
    """The site by the TLS of the arrangement."""
    with serving(HTTPServer(), server_context) as made:
        yield made
    assert all(is_of(found, arrangement.server) for found in made.classes)


@pytest.fixture
def misnamed_server(arrangement: Arrangement, ca: trustme.CA, tmp_path: Path) -> Iterator[HTTPServer]:
    """The site under the certificate of another host."""
    identity = write_key_pair(ca.issue_cert("elsewhere.example.org"), tmp_path)
    with serving(HTTPServer(), make_server_context(arrangement.server, identity)) as made:
        yield made


@pytest.fixture
def suspicious_context(arrangement: Arrangement, tmp_path: Path) -> Any:
    """A client's context that trusts another authority than the one of the servers."""
    path = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    return make_client_context(arrangement.client, str(path))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ── http.client ──


@contextlib.contextmanager
def http_client(
    server: HTTPServer, context: Any, timeout: float = PATIENCE
) -> Iterator[http.client.HTTPSConnection]:
    connection = http.client.HTTPSConnection("localhost", server.port, timeout=timeout, context=context)
    with contextlib.closing(connection):
        yield connection


def get(connection: http.client.HTTPConnection, page: str) -> bytes:
    connection.request("GET", page)
    with connection.getresponse() as response:
        assert response.status == 200
        return response.read()


def test_http_client_sends_many_requests_over_one_connection(
    server: HTTPServer, client_context: Any, arrangement: Arrangement
) -> None:
    with http_client(server, client_context) as connection:
        for _ in range(3):
            assert get(connection, "/small") == SMALL
        assert get(connection, "/large") == LARGE
        assert is_of(type(connection.sock), arrangement.client)
        assert connection.sock.version() == "TLSv1.3"
        assert not becomes_readable(connection.sock, 0)
    assert server.accepted == 1
    assert server.classes


@pytest.mark.parametrize("page", ["/last", "/unmeasured"])
def test_the_body_is_read_after_the_connection_was_closed(
    server: HTTPServer, client_context: Any, page: str
) -> None:
    with http_client(server, client_context) as connection:
        connection.request("GET", page)
        response = connection.getresponse()
        assert connection.sock is None  # http.client has closed it: the response alone holds on to it
        connection.close()
        with response:
            assert response.read() == LARGE


@pytest.mark.parametrize("as_file", [False, True], ids=["bytes", "file"])
def test_http_client_posts_some_megabytes(server: HTTPServer, client_context: Any, as_file: bool) -> None:
    with http_client(server, client_context) as connection:
        body = io.BytesIO(LARGE) if as_file else LARGE
        connection.request("POST", "/", body, {"Content-Length": str(len(LARGE))})
        with connection.getresponse() as response:
            assert response.read().decode() == digest(LARGE)


def test_http_client_loses_patience_with_a_silent_server(server: HTTPServer, client_context: Any) -> None:
    with http_client(server, client_context, SHORT) as connection:
        connection.request("GET", "/silent")
        with pytest.raises(TimeoutError, match="timed out") as caught:
            connection.getresponse()
    assert not isinstance(caught.value, ssl.SSLError)


def test_http_client_refuses_an_authority_it_does_not_trust(
    server: HTTPServer, suspicious_context: Any
) -> None:
    with http_client(server, suspicious_context) as connection:
        with pytest.raises(ssl.SSLCertVerificationError, match="CERTIFICATE_VERIFY_FAILED") as caught:
            connection.connect()
    assert caught.value.reason == "CERTIFICATE_VERIFY_FAILED"
    assert caught.value.verify_code != 0


def test_http_client_refuses_the_certificate_of_another_host(
    misnamed_server: HTTPServer, client_context: Any
) -> None:
    with http_client(misnamed_server, client_context) as connection:
        with pytest.raises(ssl.SSLCertVerificationError, match="not valid for 'localhost'") as caught:
            connection.connect()
    assert "Hostname mismatch" in caught.value.verify_message


def test_plain_http_on_the_tls_port_fails_and_the_next_client_is_served(
    server: HTTPServer, client_context: Any
) -> None:
    plain = http.client.HTTPConnection("localhost", server.port, timeout=PATIENCE)
    with contextlib.closing(plain), pytest.raises((http.client.HTTPException, ConnectionError)):
        get(plain, "/small")
    with http_client(server, client_context) as connection:
        assert get(connection, "/small") == SMALL


@pytest.fixture
def plain_port() -> Iterator[int]:
    """The port of a server that speaks plain HTTP, whatever it is asked."""

    def refuse(sock: Any) -> None:
        receive_exactly(sock, 1)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    with Background() as background:
        address, (served,) = background.serve(refuse)
        yield address[1]
        served.result(PATIENCE)


def test_tls_to_a_plain_port_is_an_ssl_error(plain_port: int, client_context: Any) -> None:
    connection = http.client.HTTPSConnection("127.0.0.1", plain_port, timeout=5, context=client_context)
    with contextlib.closing(connection), pytest.raises(ssl.SSLError) as caught:
        connection.connect()
    assert caught.value.library == "SSL"
    assert caught.value.reason


# ── urllib.request ──


def test_urlopen_reads_a_page(server: HTTPServer, client_context: Any) -> None:
    with urllib.request.urlopen(server.url("large"), timeout=PATIENCE, context=client_context) as response:
        assert response.read() == LARGE
    assert server.classes


def test_urlopen_iterates_over_what_it_reads(server: HTTPServer, client_context: Any) -> None:
    with urllib.request.urlopen(
        server.url("unmeasured"), timeout=PATIENCE, context=client_context
    ) as response:
        assert b"".join(iter(functools.partial(response.read, 10_000), b"")) == LARGE


def test_urlopen_posts(server: HTTPServer, client_context: Any) -> None:
    with urllib.request.urlopen(server.url(""), LARGE, PATIENCE, context=client_context) as response:
        assert response.read().decode() == digest(LARGE)


def test_urlopen_and_http_client_build_their_own_contexts(
    server: HTTPServer, arrangement: Arrangement, ca_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", ca_file)
    monkeypatch.setattr(urllib.request, "_opener", None)  # an earlier test's, with a context of its own
    with injection(arrangement.client):
        with urllib.request.urlopen(server.url("small"), timeout=PATIENCE) as response:
            assert response.read() == SMALL
        connection = http.client.HTTPSConnection("localhost", server.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            assert get(connection, "/small") == SMALL
            assert is_of(type(connection.sock), arrangement.client)


def test_urlopen_names_the_reason_of_a_refusal(server: HTTPServer, suspicious_context: Any) -> None:
    with pytest.raises(urllib.error.URLError) as caught:
        urllib.request.urlopen(server.url("small"), timeout=PATIENCE, context=suspicious_context)
    assert isinstance(caught.value.reason, ssl.SSLCertVerificationError)


def test_urlopen_loses_patience_with_a_silent_server(server: HTTPServer, client_context: Any) -> None:
    with pytest.raises(TimeoutError, match="timed out"):
        urllib.request.urlopen(server.url("silent"), timeout=SHORT, context=client_context)


# ── urllib3 ──


@contextlib.contextmanager
def urllib3_pool(server: HTTPServer, context: Any, **more: Any) -> Iterator[Any]:
    """A pool of urllib3's for one connection at most, which repeats nothing by itself."""
    more = {"timeout": PATIENCE, "maxsize": 1, "block": True, "retries": False, **more}
    with library("urllib3").HTTPSConnectionPool(
        "localhost", server.port, ssl_context=context, **more
    ) as made:
        yield made


def idle(pool: Any) -> Any:
    """The connection that waits in *pool* for the next request."""
    return pool.pool.queue[-1]


def test_urllib3_reuses_its_connection(
    server: HTTPServer, client_context: Any, arrangement: Arrangement
) -> None:
    with urllib3_pool(server, client_context) as pool:
        for page, body in ("/small", SMALL), ("/large", LARGE), ("/small", SMALL):
            assert pool.request("GET", page).data == body
            assert idle(pool).is_connected
        assert is_of(type(idle(pool).sock), arrangement.client)
        assert idle(pool).is_verified
        assert pool.num_connections == server.accepted == 1


def test_urllib3_notices_that_the_server_dropped_the_idle_connection(
    server: HTTPServer, client_context: Any
) -> None:
    with urllib3_pool(server, client_context) as pool:
        assert pool.request("GET", "/dropping").data == SMALL
        assert becomes_readable(idle(pool).sock)
        assert not idle(pool).is_connected
        assert pool.request("GET", "/small").data == SMALL
        assert server.accepted == 2


def fingerprint(identity: KeyPair) -> str:
    """The SHA-256 of the certificate of *identity*."""
    end = "-----END CERTIFICATE-----\n"
    pem, _, _ = Path(identity.certfile).read_text().partition(end)
    return digest(ssl.PEM_cert_to_DER_cert(pem + end))


def test_urllib3_pins_a_fingerprint(server: HTTPServer, client_context: Any, server_cert: KeyPair) -> None:
    with urllib3_pool(server, client_context, assert_fingerprint=fingerprint(server_cert)) as pool:
        assert pool.request("GET", "/small").data == SMALL
    with urllib3_pool(server, client_context, assert_fingerprint=digest(SMALL)) as pool:
        with pytest.raises(library("urllib3").exceptions.SSLError, match="Fingerprints did not match"):
            pool.request("GET", "/small")


def test_urllib3_pins_a_fingerprint_of_an_authority_that_nobody_trusts(
    server: HTTPServer, suspicious_context: Any, server_cert: KeyPair
) -> None:
    suspicious_context.check_hostname = False
    more = {"assert_fingerprint": fingerprint(server_cert), "cert_reqs": ssl.CERT_NONE}
    with urllib3_pool(server, suspicious_context, **more) as pool:
        assert pool.request("GET", "/small").data == SMALL


def test_urllib3_tells_its_time_outs_from_its_refusals(
    server: HTTPServer, client_context: Any, suspicious_context: Any
) -> None:
    exceptions = library("urllib3").exceptions
    with urllib3_pool(server, client_context, timeout=SHORT) as pool:
        with pytest.raises(exceptions.ReadTimeoutError):
            pool.request("GET", "/silent")
    with urllib3_pool(server, suspicious_context) as pool:
        with pytest.raises(exceptions.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
            pool.request("GET", "/small")


def test_urllib3_streams_and_gives_the_connection_back(server: HTTPServer, client_context: Any) -> None:
    with urllib3_pool(server, client_context) as pool:
        response = pool.request("GET", "/large", preload_content=False)
        assert b"".join(response.stream(50_000)) == LARGE
        response.release_conn()
        assert pool.request("POST", "/", body=LARGE).data.decode() == digest(LARGE)
        assert server.accepted == 1


# ── requests ──


@contextlib.contextmanager
def requests_session(context: Any, ca_file: str) -> Iterator[Any]:
    """A session of requests whose TLS is by *context*; requests itself adds *ca_file* to what that trusts."""
    adapters = library("requests.adapters")

    class Adapter(adapters.HTTPAdapter):  # type: ignore[misc, name-defined]
        def init_poolmanager(self, *args: Any, **more: Any) -> None:
            super().init_poolmanager(*args, ssl_context=context, **more)

    with library("requests").Session() as session:
        session.trust_env = False
        session.mount("https://", Adapter())
        session.verify = ca_file
        yield session
        close_pools(session)


def pools_of(session: Any) -> list[Any]:
    """The pools that *session* has used."""
    pools = session.get_adapter("https://").poolmanager.pools
    return list(map(pools.get, pools.keys()))


def close_pools(session: Any) -> None:
    """Close idle connections now: a session leaves that to the garbage collector, and the server would wait."""
    for pool in pools_of(session):
        pool.close()


@pytest.fixture
def session(client_context: Any, ca_file: str) -> Iterator[Any]:
    """A session that trusts the servers."""
    with requests_session(client_context, ca_file) as made:
        yield made


def test_requests_reuses_its_connection(server: HTTPServer, session: Any) -> None:
    for _ in range(3):
        assert session.get(server.url("small"), timeout=PATIENCE).content == SMALL
    assert server.accepted == 1
    assert server.classes


def test_requests_streams_a_body_of_some_megabytes(
    server: HTTPServer, session: Any, arrangement: Arrangement
) -> None:
    for page in "large", "last", "unmeasured":
        with session.get(server.url(page), stream=True, timeout=PATIENCE) as response:
            if page == "large":
                assert is_of(type(response.raw.connection.sock), arrangement.client)
            assert b"".join(response.iter_content(30_000)) == LARGE


def test_requests_leaves_a_stream_halfway(server: HTTPServer, session: Any) -> None:
    with session.get(server.url("large"), stream=True, timeout=PATIENCE) as response:
        assert next(response.iter_content(30_000)) == LARGE[:30_000]
    assert session.get(server.url("small"), timeout=PATIENCE).content == SMALL
    assert server.accepted == 2


def test_requests_posts_some_megabytes(server: HTTPServer, session: Any) -> None:
    for body in LARGE, io.BytesIO(LARGE):
        assert session.post(server.url(""), data=body, timeout=PATIENCE).text == digest(LARGE)
    assert server.accepted == 1


def test_requests_goes_on_after_the_server_dropped_the_idle_connection(
    server: HTTPServer, session: Any
) -> None:
    assert session.get(server.url("dropping"), timeout=PATIENCE).content == SMALL
    (pool,) = pools_of(session)
    assert becomes_readable(idle(pool).sock)
    assert session.get(server.url("small"), timeout=PATIENCE).content == SMALL
    assert server.accepted == 2


def test_requests_builds_its_own_context(server: HTTPServer, arrangement: Arrangement, ca_file: str) -> None:
    requests = library("requests")
    with injection(arrangement.client), requests.Session() as session:
        session.trust_env = False
        with session.get(server.url("large"), verify=ca_file, stream=True, timeout=PATIENCE) as response:
            assert is_of(type(response.raw.connection.sock), arrangement.client)
            assert response.content == LARGE
        with pytest.raises(requests.exceptions.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
            session.get(server.url("small"), timeout=PATIENCE)
        close_pools(session)


def test_requests_tells_its_time_outs_from_its_refusals(
    server: HTTPServer, session: Any, suspicious_context: Any
) -> None:
    exceptions = library("requests").exceptions
    with pytest.raises(exceptions.ReadTimeout):
        session.get(server.url("silent"), timeout=(PATIENCE, SHORT))
    with requests_session(suspicious_context, library("certifi").where()) as suspicious:
        with pytest.raises(exceptions.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
            suspicious.get(server.url("small"), timeout=PATIENCE)


def test_requests_refuses_the_certificate_of_another_host(misnamed_server: HTTPServer, session: Any) -> None:
    with pytest.raises(
        library("requests").exceptions.SSLError, match="not valid for 'localhost'|doesn't match"
    ):
        session.get(misnamed_server.url("small"), timeout=PATIENCE)


def test_requests_calls_a_plain_port_an_ssl_error(plain_port: int, session: Any) -> None:
    with pytest.raises(library("requests").exceptions.SSLError):
        session.get(f"https://127.0.0.1:{plain_port}/", timeout=5)
