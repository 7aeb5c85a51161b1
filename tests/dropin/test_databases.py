"""Clients of databases against real servers: PyMySQL and MariaDB, pg8000 and PostgreSQL, redis-py and Redis."""

from __future__ import annotations

import contextlib
import io
import json
import random
import select
import ssl as stdlib_ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import daemons
import pytest
import trustme
from conftest import KeyPair
from daemons import CLIENT_CERT_DATABASE, HOST, PASSWORD, START_UP, USER, Daemon, assert_ours
from dropin_rig import injection, library, make_client_context
from peers import PATIENCE

from bridge import cli

pytestmark = [
    pytest.mark.usefixtures("default_bridge"),
    pytest.mark.timeout(2 * START_UP),
]

BLOB = random.Random(7).randbytes(4_000_000)
VERSIONS = {"TLSv1.2": stdlib_ssl.TLSVersion.TLSv1_2, "TLSv1.3": stdlib_ssl.TLSVersion.TLSv1_3}
SHORT = 0.3
"""Seconds: a time-out that is meant to expire."""
THREADS = 4


@pytest.fixture
def context(ca_file: str) -> Any:
    """A client's context of the class under test."""
    return make_client_context("ours", ca_file)


@pytest.fixture
def wrong_ca_file(tmp_path: Any) -> str:
    """An authority that has not issued the servers' certificates."""
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "wrong.pem"))
    return str(tmp_path / "wrong.pem")


def speak_only(context: Any, version: str) -> Any:
    """*context*, which speaks that *version* and no other from now on."""
    context.minimum_version = context.maximum_version = VERSIONS[version]
    return context


def in_threads(work: Callable[[int], Any]) -> list[Any]:
    """What *work* returns for 0, 1, 2, ..., each in a thread of its own."""
    together = threading.Barrier(THREADS, timeout=PATIENCE)

    def start_together(number: int) -> Any:
        together.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(start_together, range(THREADS)))


# ── PyMySQL ──


@pytest.fixture(scope="module")
def mariadb(server_cert: KeyPair, ca_file: str) -> Iterator[Daemon]:
    """A MariaDB server."""
    library("pymysql")
    with daemons.mariadb(server_cert, ca_file) as server:
        yield server


@contextlib.contextmanager
def mysql_connection(server: Daemon, **options: Any) -> Iterator[Any]:
    """A connection of PyMySQL's, which is closed in the end; *options* over some of ours."""
    pymysql = library("pymysql")
    ours = {"host": "localhost", "user": USER, "connect_timeout": PATIENCE, "read_timeout": PATIENCE}
    connection = pymysql.connect(port=server.port, write_timeout=PATIENCE, **(ours | options))
    try:
        yield connection
    finally:
        if connection.open:
            connection.close()


def mysql_rows(connection: Any, query: str, *arguments: Any) -> Any:
    """All rows that *query* has for an answer."""
    with connection.cursor() as cursor:
        cursor.execute(query, arguments)
        return cursor.fetchall()


def test_pymysql_and_mariadb_agree_on_the_version_and_the_cipher(
    mariadb: Daemon, context: Any, tls_version: str
) -> None:
    with mysql_connection(mariadb, ssl=speak_only(context, tls_version)) as connection:
        assert_ours(connection._sock, tls_version)
        assert mysql_rows(connection, "SHOW STATUS LIKE 'Ssl_version'") == (("Ssl_version", tls_version),)
        cipher = connection._sock.cipher()[0]
        assert mysql_rows(connection, "SHOW STATUS LIKE 'Ssl_cipher'") == (("Ssl_cipher", cipher),)


def test_connect_says_who_mariadb_is(mariadb: Daemon, ca_file: str, capsys: Any) -> None:
    assert told_who(mariadb, "mysql", ca_file, capsys)["verified"] is True


def told_who(server: Daemon, protocol: str, ca_file: str, capsys: Any) -> Any:
    """What `tls-bridge connect` finds out about *server*, after STARTTLS."""
    command = ["connect", f"localhost:{server.port}", "--cafile", ca_file, "--starttls", protocol, "--json"]
    status = cli.main(command)
    said = capsys.readouterr().out
    assert status == 0, said
    return json.loads(said)


def test_pymysql_may_build_the_context_itself(mariadb: Daemon, ca_file: str) -> None:
    with injection():
        with mysql_connection(mariadb, host=HOST, ssl_ca=ca_file, ssl_verify_identity=True) as connection:
            assert_ours(connection._sock)
            assert mysql_rows(connection, "SELECT 6 * 7") == ((42,),)


@pytest.mark.parametrize("cursor", ["Cursor", "SSCursor"])
def test_pymysql_reads_a_result_of_some_megabytes(mariadb: Daemon, context: Any, cursor: str) -> None:
    cursorclass = getattr(library("pymysql.cursors"), cursor)
    numbers = "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 900) "
    with mysql_connection(mariadb, ssl=context) as connection:
        with connection.cursor(cursorclass) as found:
            found.execute(numbers + "SELECT n, REPEAT(CHAR(65 + n % 26), 6000) FROM numbers")
            rows = 0
            for rows, row in enumerate(found, 1):
                assert row == (rows, bytes([65 + rows % 26]) * 6000)
            assert rows == 900


def test_pymysql_sends_and_receives_some_megabytes(mariadb: Daemon, context: Any) -> None:
    with mysql_connection(mariadb, ssl=context) as connection:
        assert mysql_rows(connection, "SELECT LENGTH(%s), %s", BLOB, BLOB[::-1]) == ((len(BLOB), BLOB[::-1]),)


def test_pymysql_in_threads_with_a_connection_each(mariadb: Daemon, context: Any) -> None:
    def ask(number: int) -> Any:
        with mysql_connection(mariadb, ssl=context) as connection:
            for turn in range(50):
                text = f"{number}:{turn};" * 1000
                assert mysql_rows(connection, "SELECT %s, %s", turn, text) == ((turn, text),)
            return mysql_rows(connection, "SELECT CONNECTION_ID()")

    assert len(set(in_threads(ask))) == THREADS


def test_the_read_timeout_of_pymysql_expires(mariadb: Daemon, context: Any) -> None:
    error = library("pymysql").err.OperationalError
    with mysql_connection(mariadb, ssl=context, read_timeout=SHORT) as connection:
        assert mysql_rows(connection, "SELECT 1") == ((1,),)
        with pytest.raises(error, match=r"Lost connection .*timed out"):
            mysql_rows(connection, f"SELECT SLEEP({PATIENCE})")
        assert not connection.open
        connection.connect()
        assert mysql_rows(connection, "SELECT 2") == ((2,),)


def test_pymysql_hears_that_the_server_ends_its_connection(mariadb: Daemon, context: Any) -> None:
    error = library("pymysql").err.OperationalError
    with (
        mysql_connection(mariadb, ssl=context) as connection,
        mysql_connection(mariadb, ssl=context) as admin,
    ):
        ((before,),) = mysql_rows(connection, "SELECT CONNECTION_ID()")
        mysql_rows(admin, "KILL %s", before)
        with pytest.raises(error):
            mysql_rows(connection, f"SELECT SLEEP({PATIENCE})")
        connection.connect()
        ((after,),) = mysql_rows(connection, "SELECT CONNECTION_ID()")
        assert after != before


def test_pymysql_refuses_a_server_of_another_authority(mariadb: Daemon, wrong_ca_file: str) -> None:
    context = make_client_context("ours", wrong_ca_file)
    with pytest.raises(library("pymysql").err.OperationalError, match="CERTIFICATE_VERIFY_FAILED") as caught:
        with mysql_connection(mariadb, ssl=context):
            pass
    assert isinstance(caught.value.original_exception, stdlib_ssl.SSLCertVerificationError)


# ── pg8000 ──


@pytest.fixture(scope="module")
def postgresql(server_cert: KeyPair, ca_file: str) -> Iterator[Daemon]:
    """A PostgreSQL server."""
    library("pg8000.dbapi")
    with daemons.postgresql(server_cert, ca_file) as server:
        yield server


@contextlib.contextmanager
def pg_connection(server: Daemon, ssl_context: Any, **options: Any) -> Iterator[Any]:
    """A connection of pg8000's, which is closed in the end; *options* over some of ours."""
    ours = {"host": HOST, "user": USER, "password": PASSWORD, "database": "postgres", "timeout": PATIENCE}
    pg8000 = library("pg8000.dbapi")
    connection = pg8000.connect(port=server.port, ssl_context=ssl_context, **(ours | options))
    file = connection._sock
    try:
        yield connection
    finally:
        with contextlib.suppress(pg8000.InterfaceError, OSError):
            connection.close()
        with contextlib.suppress(OSError):
            file.close()  # the traceback of an expected error would keep it, and the socket, open


def pg_rows(connection: Any, query: str, *arguments: Any, stream: Any = None) -> list[Any]:
    """All rows that *query* has for an answer."""
    cursor = connection.cursor()
    cursor.execute(query, arguments, stream=stream)
    return [] if cursor.description is None else [tuple(row) for row in cursor.fetchall()]


MY_SESSION = "SELECT ssl, version, cipher FROM pg_stat_ssl WHERE pid = pg_backend_pid()"


def test_connect_says_who_postgresql_is(postgresql: Daemon, ca_file: str, capsys: Any) -> None:
    assert "localhost" in told_who(postgresql, "postgres", ca_file, capsys)["chain"][0]["names"]


def test_pg8000_binds_its_password_to_the_channel(postgresql: Daemon, context: Any, tls_version: str) -> None:
    with pg_connection(postgresql, speak_only(context, tls_version)) as connection:
        assert connection.auth.mechanism_name == "SCRAM-SHA-256-PLUS"
        assert_ours(connection._usock, tls_version)
        cipher = connection._usock.cipher()[0]
        assert pg_rows(connection, MY_SESSION) == [(True, tls_version, cipher)]


def test_pg8000_may_build_the_context_itself(postgresql: Daemon) -> None:
    """It verifies nothing then, and yet the certificate is there for the channel binding."""
    with injection(), pg_connection(postgresql, True) as connection:
        assert_ours(connection._usock)
        assert connection.auth.mechanism_name == "SCRAM-SHA-256-PLUS"
        assert pg_rows(connection, "SELECT 6 * 7") == [(42,)]


def test_pg8000_shows_a_certificate(postgresql: Daemon, context: Any, client_cert: KeyPair) -> None:
    refused = library("pg8000.dbapi").DatabaseError
    with pytest.raises(refused, match="requires a valid client certificate"):
        with pg_connection(postgresql, context, database=CLIENT_CERT_DATABASE):
            pass
    context.load_cert_chain(client_cert.certfile, client_cert.keyfile)
    query = "SELECT client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    with pg_connection(postgresql, context, database=CLIENT_CERT_DATABASE) as connection:
        ((name,),) = pg_rows(connection, query)
    assert "trustme" in name


def test_pg8000_reads_large_rows(postgresql: Daemon, context: Any) -> None:
    query = "SELECT i, repeat(chr(65 + i % 26), 10000) FROM generate_series(1, 500) AS i"
    with pg_connection(postgresql, context) as connection:
        rows = pg_rows(connection, query)
    assert len(rows) == 500
    assert all(row == (number, chr(65 + number % 26) * 10000) for number, row in enumerate(rows, 1))


def test_pg8000_sends_and_receives_some_megabytes(postgresql: Daemon, context: Any) -> None:
    with pg_connection(postgresql, context) as connection:
        assert pg_rows(connection, "SELECT CAST(%s AS bytea)", BLOB) == [(BLOB,)]


def test_pg8000_copies_a_table_in_and_out(postgresql: Daemon, context: Any) -> None:
    lines = "".join(f"{number}\t{'x' * (number % 200)}\n" for number in range(20_000)).encode()
    copied = io.BytesIO()
    with pg_connection(postgresql, context) as connection:
        pg_rows(connection, "CREATE TEMPORARY TABLE copied (number integer, text text)")
        pg_rows(connection, "COPY copied FROM STDIN", stream=io.BytesIO(lines))
        pg_rows(connection, "COPY (SELECT * FROM copied ORDER BY number) TO STDOUT", stream=copied)
    assert copied.getvalue() == lines


def test_pg8000_in_threads_with_a_connection_each(postgresql: Daemon, context: Any) -> None:
    def ask(number: int) -> int:
        with pg_connection(postgresql, context) as connection:
            for turn in range(50):
                text = f"{number}:{turn};" * 1000
                assert pg_rows(connection, "SELECT CAST(%s AS text)", text) == [(text,)]
            ((process,),) = pg_rows(connection, "SELECT pg_backend_pid()")
            return int(process)

    assert len(set(in_threads(ask))) == THREADS


def test_the_timeout_of_pg8000_expires(postgresql: Daemon, context: Any) -> None:
    network_error = library("pg8000.dbapi").InterfaceError
    with pg_connection(postgresql, context) as connection:
        connection._usock.settimeout(SHORT)
        with pytest.raises((network_error, TimeoutError)) as caught:
            pg_rows(connection, f"SELECT pg_sleep({PATIENCE})")
    error = caught.value.__cause__ or caught.value
    assert isinstance(error, TimeoutError) and not isinstance(error, stdlib_ssl.SSLError)


def test_pg8000_hears_that_the_server_ends_its_connection(postgresql: Daemon, context: Any) -> None:
    errors = library("pg8000.dbapi").Error
    with pg_connection(postgresql, context) as connection, pg_connection(postgresql, context) as admin:
        ((process,),) = pg_rows(connection, "SELECT pg_backend_pid()")
        assert pg_rows(admin, "SELECT pg_terminate_backend(%s)", process) == [(True,)]
        with pytest.raises(errors):
            pg_rows(connection, f"SELECT pg_sleep({PATIENCE})")


def test_pg8000_refuses_a_server_of_another_authority(postgresql: Daemon, wrong_ca_file: str) -> None:
    with pytest.raises(stdlib_ssl.SSLCertVerificationError, match="CERTIFICATE_VERIFY_FAILED"):
        with pg_connection(postgresql, make_client_context("ours", wrong_ca_file)):
            pass


# ── redis-py ──


@pytest.fixture(scope="module")
def redis_server(server_cert: KeyPair, ca_file: str) -> Iterator[Daemon]:
    """A Redis server."""
    library("redis")
    with daemons.redis_server(server_cert, ca_file) as server:
        yield server


@pytest.fixture(params=["_RESP2Parser", "_HiredisParser"])
def parser(request: pytest.FixtureRequest) -> Any:
    """Each of redis-py's parsers: its own in Python, and hiredis."""
    if request.param == "_HiredisParser":
        library("hiredis")
    return getattr(library("redis._parsers"), request.param)


class Keeper:
    """Makes clients of redis-py, and closes them in the end."""

    def __init__(self, port: int, ca_file: str, parser: Any, stack: contextlib.ExitStack) -> None:
        self._always = {"port": port, "ssl": True, "ssl_ca_certs": ca_file}
        self._parser = parser
        self._stack = stack

    def __call__(self, **options: Any) -> Any:
        """A client that tries everything once; *options* over ours."""
        redis = library("redis")
        never = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
        ours = self._always | {"host": HOST, "socket_timeout": PATIENCE, "retry": never}
        client = redis.Redis(**(ours | options))
        client.connection_pool.connection_kwargs["parser_class"] = self._parser
        self._stack.callback(client.close)
        return client


@pytest.fixture
def make_redis(redis_server: Daemon, ca_file: str, parser: Any) -> Iterator[Keeper]:
    """What makes clients of redis-py, which build their contexts themselves, of the class under test."""
    with injection(), contextlib.ExitStack() as stack:
        client = Keeper(redis_server.port, ca_file, parser, stack)
        client().flushall()
        yield client


def redis_socket(client: Any) -> Any:
    """The socket of the connection that *client* uses next."""
    connection = client.connection_pool.get_connection()
    client.connection_pool.release(connection)
    assert_ours(connection._sock)
    return connection._sock


def test_redis_takes_commands(make_redis: Keeper, parser: Any, tls_version: str) -> None:
    make_redis().config_set("tls-protocols", tls_version)
    try:
        client = make_redis(host="localhost")
        assert client.set("name", "value") and client.get("name") == b"value"
        assert client.rpush("list", *range(100)) == 100
        assert client.lrange("list", 0, -1) == [str(number).encode() for number in range(100)]
        assert_ours(redis_socket(client), tls_version)
        used = client.connection_pool._available_connections[-1]._parser
        assert ("Hiredis" in type(used).__name__) == ("Hiredis" in parser.__name__)
    finally:
        make_redis().config_set("tls-protocols", "TLSv1.2 TLSv1.3")


def test_a_redis_pipeline_of_some_thousand_commands(make_redis: Keeper) -> None:
    client = make_redis()
    pipeline = client.pipeline(transaction=False)
    for number in range(5000):
        pipeline.set(f"key {number}", "v" * (number % 100)).get(f"key {number}")
    answers = pipeline.execute()
    assert answers[::2] == [True] * 5000
    assert answers[1::2] == [b"v" * (number % 100) for number in range(5000)]


def test_redis_keeps_values_of_some_megabytes(make_redis: Keeper) -> None:
    client = make_redis()
    client.mset({"blob": BLOB, "reversed": BLOB[::-1]})
    assert client.mget("blob", "reversed") == [BLOB, BLOB[::-1]]


def test_one_redis_client_in_threads(make_redis: Keeper) -> None:
    client = make_redis()

    def count(number: int) -> None:
        for turn in range(100):
            client.incr("counter")
            assert client.getset(f"turn {number}", turn) == (str(turn - 1).encode() if turn else None)

    in_threads(count)
    assert client.get("counter") == str(100 * THREADS).encode()
    assert_ours(redis_socket(client))


def test_redis_listens_in_a_thread_while_others_publish(make_redis: Keeper) -> None:
    publishers = make_redis()
    heard: list[bytes] = []
    listening = threading.Event()

    def listen() -> None:
        with make_redis().pubsub() as subscription:
            subscription.subscribe("news")
            for message in subscription.listen():
                if message["type"] == "subscribe":
                    assert_ours(subscription.connection._sock)
                    listening.set()
                elif message["data"] == b"end":
                    return
                else:
                    heard.append(message["data"])

    with ThreadPoolExecutor(1) as pool:
        listener = pool.submit(listen)
        assert listening.wait(PATIENCE)
        in_threads(lambda n: [publishers.publish("news", f"{n} {turn} " + "x" * 500) for turn in range(200)])
        publishers.publish("news", "end")
        listener.result(PATIENCE)
    words = [message.split() for message in heard]
    for number in range(THREADS):
        turns = [int(word[1]) for word in words if int(word[0]) == number]
        assert turns == list(range(200))
    assert {word[2] for word in words} == {b"x" * 500}


def test_a_blocking_redis_command_times_out_and_the_client_lives_on(make_redis: Keeper) -> None:
    client = make_redis(socket_timeout=SHORT)
    with pytest.raises(library("redis").TimeoutError, match="Timeout reading from socket"):
        client.blpop("nothing", timeout=PATIENCE)
    assert client.set("after", "all") and client.get("after") == b"all"
    assert client.blpop("nothing", timeout=SHORT / 10) is None


def test_redis_subscriptions_can_be_polled(make_redis: Keeper) -> None:
    client = make_redis()
    with client.pubsub(ignore_subscribe_messages=True) as subscription:
        subscription.subscribe("news")
        assert subscription.get_message(timeout=PATIENCE) is None, "that is the answer to subscribe"
        assert subscription.get_message(timeout=0) is None
        assert subscription.get_message(timeout=SHORT) is None
        client.publish("news", "something")
        assert subscription.get_message(timeout=PATIENCE)["data"] == b"something"


def test_redis_checks_the_health_of_its_connections(make_redis: Keeper) -> None:
    admin = make_redis()
    client = make_redis(health_check_interval=1e-6)
    client.get("anything")
    admin.config_resetstat()
    for _ in range(10):
        client.get("anything")
    assert admin.info("commandstats")["cmdstat_ping"]["calls"] >= 10


def test_redis_replaces_a_connection_that_was_killed(make_redis: Keeper) -> None:
    client = make_redis()
    before = client.client_id()
    sock = redis_socket(client)
    assert make_redis().client_kill_filter(_id=before) == 1
    hung_up = select.poll()
    hung_up.register(sock, getattr(select, "POLLRDHUP", select.POLLHUP))
    assert hung_up.poll(PATIENCE * 1000), "the socket does not tell that its peer has gone"
    assert client.client_id() != before
    assert_ours(redis_socket(client))


def test_a_redis_client_with_a_certificate(make_redis: Keeper, client_cert: KeyPair) -> None:
    make_redis().config_set("tls-auth-clients", "yes")
    identity = {"ssl_certfile": client_cert.certfile, "ssl_keyfile": client_cert.keyfile}
    client = make_redis(**identity)
    try:
        assert client.ping()
        with pytest.raises(library("redis").ConnectionError):
            make_redis().ping()
    finally:
        client.config_set("tls-auth-clients", "optional")


def test_redis_refuses_a_server_of_another_authority(make_redis: Keeper, wrong_ca_file: str) -> None:
    client = make_redis(ssl_ca_certs=wrong_ca_file)
    with pytest.raises(library("redis").ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
        client.ping()
