"""Starts a server and the load generator, each on its own core, and reads what they cost."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import trustme

HERE = Path(__file__).parent
ANSWER_SECONDS = 120.0
"""How long the generator may take beyond its measuring time before a run counts as failed."""

START_SECONDS = 20.0
"""How long a server may take until it listens."""
SETTLE_SECONDS = 0.5
"""What the last connection made a server do is over by then, and not charged to its idleness."""


class Failed(Exception):
    """A run that gives no figure; the message says why."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """What every run shares: the compiled programs, a throw-away certificate, and the cores."""

    load: Path
    server: Path
    cert: Path
    key: Path
    server_core: int
    load_core: int
    handlers: int

    def library(self, role: str, peer: str, core: int, **options: object) -> list[str]:
        """How to start a program of libraries.py, with the `ssl` that *peer* stands for."""
        module = "bridge.ssl" if peer == "bridge-dropin" else "ssl"
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        return [sys.executable, str(HERE / "libraries.py"), role, module, "--core", str(core), *words]

    def command(self, peer: str, role: str, block: int) -> list[str]:
        """How to start *peer*: "c" is the program of this suite, others are in servers.py and libraries.py."""
        if role == "http-server":
            return self.library(role, peer, self.server_core, cert=self.cert, key=self.key)
        if peer == "c":
            return [str(self.server), role, str(self.cert), str(self.key), str(self.server_core)]
        options = {
            "--cert": self.cert,
            "--key": self.key,
            "--core": self.server_core,
            "--block": block,
            "--handlers": self.handlers,
        }
        words = [str(word) for option in options.items() for word in option]
        return [sys.executable, str(HERE / "servers.py"), peer, role, *words]


def compile_program(name: str, folder: Path) -> Path:
    """Compiles NAME.c of this directory into *folder*; Failed says what to install."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise Failed("no C compiler: the load generator needs one (Debian: apt-get install gcc libssl-dev)")
    program = folder / name
    command = [compiler, "-O2", "-o", str(program), str(HERE / f"{name}.c"), "-lssl", "-lcrypto"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        hint = "OpenSSL's headers are missing (Debian: apt-get install libssl-dev)\n"
        raise Failed(f"{name}.c does not compile: {hint if 'openssl/' in done.stderr else ''}{done.stderr}")
    return program


def prepare(folder: Path, server_core: int, load_core: int, handlers: int) -> Bench:
    """Compiles the programs and makes a certificate (ECDSA P-256) in *folder*.  Raises Failed."""
    leaf = trustme.CA().issue_cert("localhost")
    cert, key = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    leaf.private_key_pem.write_to_path(str(key))
    load, server = (compile_program(name, folder) for name in ("load", "server"))
    return Bench(load, server, cert, key, server_core, load_core, handlers)


class Server:
    """A server process, from `with` to the end of its block."""

    def __init__(self, bench: Bench, peer: str, role: str, block: int) -> None:
        self._process = subprocess.Popen(
            bench.command(peer, role, block),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.pid = self._process.pid

    def __enter__(self) -> Server:
        output = self._process.stdout
        assert output is not None
        spoke = select.select([output], [], [], START_SECONDS)[0]
        word, _, port = output.readline().decode().partition(" ") if spoke else ("", "", "")
        if word != "port":
            raise Failed(f"the server did not start: {self._end()}")
        self.port = int(port)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        complaint = self._end()
        if isinstance(error, Failed):
            raise Failed(f"{error}; the server said: {complaint or 'nothing'}") from error
        if complaint:
            print(f"  the server said: {complaint[-500:]}", file=sys.stderr)

    def _end(self) -> str:
        """Ends the process by closing its stdin, and returns its last words."""
        try:
            _, complaint = self._process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            _, complaint = self._process.communicate()
        return complaint.decode(errors="replace")[-2000:].strip()

    def cpu(self) -> float:
        """CPU seconds of all its threads so far: the clock of clock_getcpuclockid(3), in Linux's encoding."""
        return time.clock_gettime((~self.pid << 3) | 2)

    def status(self) -> dict[str, str]:
        """The fields of /proc/PID/status (proc(5))."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def rss(self) -> int:
        """Resident memory in KiB."""
        return int(self.status()["VmRSS"].split()[0])

    def threads(self) -> int:
        return int(self.status()["Threads"])


def generator(bench: Bench, server: Server, mode: str, **options: float) -> list[str]:
    """The command line of the load generator."""
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    fixed = ["--port", str(server.port), "--core", str(bench.load_core), "--pid", str(server.pid)]
    return [str(bench.load), mode, *fixed, *words]


def run_load(bench: Bench, server: Server, mode: str, **options: float) -> dict[str, Any]:
    """One measured window; the generator's own report.  Raises Failed."""
    patience = ANSWER_SECONDS + options["seconds"] + options["warmup"]
    command = generator(bench, server, mode, **options)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"the load generator did not end within {patience:.0f} s") from error
    if done.returncode != 0:
        raise Failed(done.stderr.strip())
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def run_library(bench: Bench, role: str, peer: str, port: int, **options: object) -> dict[str, Any]:
    """What a client of libraries.py measured.  Raises Failed."""
    command = bench.library(role, peer, bench.load_core, port=port, **options)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{role} did not end within {ANSWER_SECONDS:.0f} s") from error
    if done.returncode != 0:
        raise Failed(done.stderr.strip())
    report: dict[str, Any] = json.loads(done.stdout)
    return report


class Broker:
    """Mosquitto with TLS, from `with` to the end of its block.  Raises Failed where it is not installed."""

    def __init__(self, bench: Bench) -> None:
        program = shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin")
        if program is None:
            raise Failed("no mosquitto (Debian: apt-get install mosquitto)")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        folder = Path(tempfile.mkdtemp(prefix="broker-"))
        shutil.copy(bench.key, folder / "key.pem")
        settings = f"listener {self.port} 127.0.0.1\nallow_anonymous true\nuser root\n"
        settings += f"certfile {bench.cert}\nkeyfile {folder / 'key.pem'}\n"
        (folder / "broker.conf").write_text(settings)
        self._folder = folder
        self._process = subprocess.Popen(
            [program, "-c", str(folder / "broker.conf")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def __enter__(self) -> Broker:
        deadline = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except ConnectionRefusedError:
                time.sleep(0.01)
        self.__exit__()
        raise Failed("mosquitto did not start")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        shutil.rmtree(self._folder)


def cpu_over(server: Server, seconds: float) -> float:
    """CPU seconds the server uses while nobody asks anything of it, per second, once it has come to rest."""
    time.sleep(SETTLE_SECONDS)
    begin, cpu = time.monotonic(), server.cpu()
    time.sleep(seconds)
    return (server.cpu() - cpu) / (time.monotonic() - begin)


def run_idle(bench: Bench, server: Server, connections: int, seconds: float) -> dict[str, Any]:
    """What *connections* idle sessions cost, each of which made one round trip.  Raises Failed.

    A first handful of sessions comes and goes before the zero is taken, so that what a server loads
    once is not charged to its sessions.
    """
    with subprocess.Popen(generator(bench, server, "idle", connections=8), stdin=-1, stdout=-1) as first:
        first.communicate()
    empty_cpu = cpu_over(server, seconds)
    rss, threads = server.rss(), server.threads()
    command = generator(bench, server, "idle", connections=connections)
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1) as holder:
        assert holder.stdout is not None and holder.stderr is not None
        line = holder.stdout.readline()
        if not line:
            raise Failed(holder.stderr.read().decode().strip())
        opened = json.loads(line)
        idle_cpu = cpu_over(server, seconds)
        figures = {
            "rss_empty_kb": rss,
            "kb_per_session": (server.rss() - rss) / connections,
            "threads_per_session": (server.threads() - threads) / connections,
            "threads_empty": threads,
            "cpu_empty": empty_cpu,
            "cpu_idle": idle_cpu,
        }
        holder.communicate()
    return {**opened, **figures}
