"""Real servers for the drop-in's clients: each in a temporary folder, on a free port of 127.0.0.1, with TLS only."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from dropin_rig import our_ssl, program
from peers import PATIENCE

if TYPE_CHECKING:
    from conftest import KeyPair

HOST = "127.0.0.1"
START_UP = 60.0
"""Seconds that a server may take to start."""
USER, PASSWORD = "bridge", "a word that passes"
NOBODY = "nobody"
"""Who runs the servers when the tests are root's: most of them refuse to be."""
CLIENT_CERT_DATABASE = "template1"
"""PostgreSQL asks for a client's certificate here."""


def assert_ours(sock: Any, version: str | None = None) -> None:
    """Fail unless *sock* is of the class under test, and speaks that *version* of TLS."""
    assert isinstance(sock, our_ssl().SSLSocket), type(sock)
    assert version is None or sock.version() == version


# ── a server's process ──


class Daemon:
    """A server as a process in the foreground, which is ended by its id.

    *ready* says whether the server on a port is ready to serve; it raises OSError if nobody is there.
    """

    def __init__(
        self,
        command: list[str],
        folder: Path,
        port: int,
        ready: Callable[[int], bool] | None = None,
        stop_signal: int = signal.SIGTERM,
    ) -> None:
        self.port = port
        self._command = command
        self._folder = folder
        self._ready = ready or accepts
        self._stop_signal = stop_signal
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the program, and wait until it serves."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **surroundings(self._folder)
            )
        self._until(self._serves, START_UP)

    def stop(self, stop_signal: int | None = None) -> None:
        """End the process with *stop_signal*, by default its own, or by force if that takes too long."""
        if self._process is None:
            return
        self._process.send_signal(stop_signal or self._stop_signal)
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait_for_log(self, text: str) -> None:
        """Wait until the server has said *text*."""
        self._until(lambda: text in self.log(), PATIENCE)

    def log(self) -> str:
        """What the server said so far."""
        return (self._folder / "log").read_text(errors="replace")

    def _serves(self) -> bool:
        try:
            return self._ready(self.port)
        except OSError:
            return False

    def _until(self, condition: Callable[[], bool], patience: float) -> None:
        assert self._process is not None
        deadline = time.monotonic() + patience
        while not condition():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.02)
                pytest.fail(f"{self._command[0]} ended by itself:\n{self.log()}", pytrace=False)
            if time.monotonic() > deadline:
                pytest.fail(f"{self._command[0]} was waited for in vain:\n{self.log()}", pytrace=False)


def accepts(port: int) -> bool:
    """Whether *port* takes connections."""
    with socket.create_connection((HOST, port), PATIENCE):
        return True


def free_port() -> int:
    """A port that is not in use, from below those that the kernel gives to clients."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind((HOST, port))
            return port
    raise RuntimeError("no port is free")


@contextlib.contextmanager
def server_folder(identity: KeyPair, ca_file: str) -> Iterator[Path]:
    """A temporary folder with copies of the certificates, owned by the user that the servers run as."""
    with tempfile.TemporaryDirectory(prefix="bridge-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        shutil.copy(identity.certfile, folder / "cert.pem")
        shutil.copy(identity.keyfile, folder / "key.pem")
        shutil.copy(ca_file, folder / "ca.pem")
        (folder / "key.pem").chmod(0o600)
        for path in (folder, *folder.iterdir()):
            give_away(path)
        yield folder


def give_away(path: Path) -> None:
    """Make *path* the property of the user that the servers run as."""
    if os.geteuid() == 0:
        shutil.chown(path, NOBODY)


def surroundings(folder: Path) -> dict[str, Any]:
    """Popen's arguments for a program in *folder* that must not be root, and that speaks English."""
    found: dict[str, Any] = {"cwd": folder, "env": {**os.environ, "LC_ALL": "C"}}
    if os.geteuid() == 0:
        import pwd

        found.update(user=NOBODY, group=pwd.getpwnam(NOBODY).pw_gid, extra_groups=[])
    return found


@contextlib.contextmanager
def running(daemon: Daemon) -> Iterator[Daemon]:
    """*daemon*, started, and stopped in the end."""
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.stop()


# ── the servers ──


@contextlib.contextmanager
def mariadb(identity: KeyPair, ca_file: str) -> Iterator[Daemon]:
    """MariaDB; it asks no password, for the tables with the users are what takes time to install."""
    executable = program("mariadbd")
    with server_folder(identity, ca_file) as folder:
        port = free_port()
        (folder / "data").mkdir()
        give_away(folder / "data")
        command = [executable, "--no-defaults", f"--datadir={folder / 'data'}", f"--tmpdir={folder}"]
        command += [f"--socket={folder / 'socket'}", f"--pid-file={folder / 'pid'}"]
        command += [f"--bind-address={HOST}", f"--port={port}", "--skip-name-resolve", "--skip-grant-tables"]
        command += [f"--ssl-cert={folder / 'cert.pem'}", f"--ssl-key={folder / 'key.pem'}"]
        command += ["--require-secure-transport=ON", "--max-allowed-packet=64M"]
        command += ["--innodb-buffer-pool-size=16M", "--innodb-log-file-size=4M"]
        command += ["--innodb-flush-method=nosync", "--innodb-fast-shutdown=2"]
        with running(Daemon(command, folder, port)) as daemon:
            yield daemon


@contextlib.contextmanager
def postgresql(identity: KeyPair, ca_file: str) -> Iterator[Daemon]:
    """PostgreSQL, with USER and PASSWORD; in CLIENT_CERT_DATABASE it asks for a certificate as well."""
    # Debian keeps the server's programs out of the PATH, in a folder for each version.
    initdb = program("initdb", *sorted(glob("/usr/lib/postgresql/*/bin/initdb"), reverse=True))
    with server_folder(identity, ca_file) as folder:
        port = free_port()
        (folder / "password").write_text(PASSWORD)
        command = [initdb, f"--pgdata={folder / 'data'}", f"--username={USER}", "--auth=scram-sha-256"]
        command += [f"--pwfile={folder / 'password'}", "--no-sync", "--no-locale", "--encoding=UTF8"]
        made = subprocess.run(
            command, capture_output=True, text=True, timeout=START_UP, **surroundings(folder)
        )
        assert made.returncode == 0, made.stdout + made.stderr
        (folder / "data" / "pg_hba.conf").write_text(
            f"hostssl {CLIENT_CERT_DATABASE} all {HOST}/32 scram-sha-256 clientcert=verify-ca\n"
            f"hostssl all all {HOST}/32 scram-sha-256\n"
        )
        settings = {
            "listen_addresses": HOST,
            "port": port,
            "unix_socket_directories": "",
            "ssl": "on",
            "ssl_cert_file": folder / "cert.pem",
            "ssl_key_file": folder / "key.pem",
            "ssl_ca_file": folder / "ca.pem",
            "fsync": "off",
            "autovacuum": "off",
            "shared_buffers": "16MB",
            "max_connections": 20,
        }
        command = [str(Path(initdb).resolve().with_name("postgres")), "-D", str(folder / "data")]
        command += [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with running(Daemon(command, folder, port, postgresql_answers, signal.SIGINT)) as daemon:
            yield daemon


def postgresql_answers(port: int) -> bool:
    """Whether the server that listens on *port* has come so far that it refuses a client without TLS."""
    parameters = f"user\0{USER}\0database\0postgres\0\0".encode()
    with socket.create_connection((HOST, port), PATIENCE) as sock, sock.makefile("rb") as answer:
        sock.sendall(struct.pack("!II", 8 + len(parameters), 3 << 16) + parameters)
        said = answer.read()
    cannot_connect_now = b"C57P03\0"
    return said.startswith(b"E") and cannot_connect_now not in said


@contextlib.contextmanager
def redis_server(identity: KeyPair, ca_file: str) -> Iterator[Daemon]:
    """Redis, which keeps everything in memory; a client may show a certificate."""
    executable = program("redis-server")
    with server_folder(identity, ca_file) as folder:
        port = free_port()
        command = [executable, "--port", "0", "--tls-port", str(port), "--bind", HOST, "--dir", str(folder)]
        command += ["--tls-cert-file", "cert.pem", "--tls-key-file", "key.pem"]
        command += ["--tls-ca-cert-file", "ca.pem"]
        command += ["--tls-auth-clients", "optional", "--save", "", "--appendonly", "no"]
        with running(Daemon(command, folder, port)) as daemon:
            yield daemon


@contextlib.contextmanager
def mosquitto(identity: KeyPair, ca_file: str) -> Iterator[Daemon]:
    """Mosquitto, which takes anybody, drops nothing, and logs who comes and how he goes."""
    executable = program("mosquitto")
    with server_folder(identity, ca_file) as folder:
        port = free_port()
        (folder / "mosquitto.conf").write_text(
            f"listener {port} {HOST}\n"
            f"certfile {folder / 'cert.pem'}\n"
            f"keyfile {folder / 'key.pem'}\n"
            "allow_anonymous true\n"
            "persistence false\n"
            "max_queued_messages 0\n"
            "set_tcp_nodelay true\n"
            "log_dest stderr\n"
            "log_type all\n"
        )
        with running(Daemon([executable, "-c", "mosquitto.conf"], folder, port)) as daemon:
            yield daemon
