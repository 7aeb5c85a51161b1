"""Starts a server and the load generator, each on its own core, and reads what they cost."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import resource
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

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
    """What every run shares: the compiled programs, throw-away certificates in *folder*, and the cores."""

    load: Path
    server: Path
    folder: Path
    server_core: int
    load_core: int
    two_cores: str
    handlers: int

    def identity(self, kind: str) -> tuple[Path, Path]:
        """The PEM files of a self-signed certificate and its key; *kind* is ``ecdsa``, ``rsa2048`` or ``rsa4096``."""
        cert_file, key_file = self.folder / f"{kind}-cert.pem", self.folder / f"{kind}-key.pem"
        if not cert_file.exists():
            key = new_key(kind)
            name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
            today = datetime.datetime.now(datetime.timezone.utc)
            builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            builder = builder.not_valid_before(today).not_valid_after(today + datetime.timedelta(days=7))
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
            pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
            key_file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
            cert_file.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(pem))
        return cert_file, key_file

    def library(self, role: str, peer: str, core: int, **options: object) -> list[str]:
        """How to start a program of libraries.py, with the `ssl` that *peer* stands for."""
        module = "bridge.ssl" if peer == "bridge-dropin" else "ssl"
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        return [sys.executable, str(HERE / "libraries.py"), role, module, "--core", str(core), *words]

    def command(self, peer: str, role: str, **options: object) -> list[str]:
        """How to start *peer*: "c" is the program of this suite, others are in servers.py and libraries.py."""
        cert, key = self.identity(str(options.pop("identity", "ecdsa")))
        cores = str(options.pop("cores", self.server_core))
        if role in ("http-server", "cheroot"):
            return self.library(role, peer, self.server_core, cert=cert, key=key)
        if peer == "c":
            return [str(self.server), role, str(cert), str(key), str(self.server_core)]
        options |= {"cert": cert, "key": key, "cores": cores, "handlers": self.handlers}
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        return [sys.executable, str(HERE / "servers.py"), peer, role, *words]


def new_key(kind: str) -> ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey:
    """A private key; see `Bench.identity`."""
    if kind == "ecdsa":
        return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(65537, int(kind.removeprefix("rsa")))


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
    """Compiles the programs into *folder*.  Raises Failed.

    Where there are three cores, a server that may have two of them leaves the generator its own.
    """
    others = sorted(os.sched_getaffinity(0) - {server_core, load_core})
    two_cores = f"{server_core},{others[0] if others else load_core}"
    load, server = (compile_program(name, folder) for name in ("load", "server"))
    return Bench(load, server, folder, server_core, load_core, two_cores, handlers)


class Server:
    """A server process, from `with` to the end of its block; *options* are those of servers.py."""

    def __init__(self, bench: Bench, peer: str, role: str, **options: object) -> None:
        self._process = subprocess.Popen(
            bench.command(peer, role, **options),
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

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


def generator(bench: Bench, server: Server, mode: str, **options: float) -> list[str]:
    """The command line of the load generator."""
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    fixed = ["--port", str(server.port), "--core", str(bench.load_core), "--pid", str(server.pid)]
    return [str(bench.load), mode, *fixed, *words]


def said_by(command: list[str], who: str, patience: float) -> str:
    """What *command* wrote until it ended, within *patience* seconds and with success; Failed, naming *who*, if not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{who} did not end within {patience:.0f} s") from error
    if done.returncode != 0:
        raise Failed(done.stderr.strip())
    return done.stdout


def run_load(bench: Bench, server: Server, mode: str, **options: float) -> dict[str, Any]:
    """One measured window; the generator's own report.  Raises Failed."""
    patience = ANSWER_SECONDS + options["seconds"] + options["warmup"]
    command = generator(bench, server, mode, **options)
    report: dict[str, Any] = json.loads(said_by(command, "the load generator", patience))
    return report


def run_library(bench: Bench, role: str, peer: str, port: int, **options: object) -> dict[str, Any]:
    """What a client of libraries.py measured.  Raises Failed."""
    command = bench.library(role, peer, bench.load_core, port=port, **options)
    report: dict[str, Any] = json.loads(said_by(command, role, ANSWER_SECONDS))
    return report


WRK_REPORT = """done = function(summary, latency, requests)
  io.write(string.format('{"operations": %d, "seconds": %.4f, "p50_us": %.1f, "p99_us": %.1f, "errors": %d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(99),
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status
    + summary.errors.timeout))
end
"""


def run_http(bench: Bench, server: Server, clients: int, seconds: float, warmup: float) -> dict[str, Any]:
    """Requests on *clients* connections that stay: by wrk, or where it is not installed by `http.client`.

    The generator's own CPU is part of the figures, so that a reader sees which of them was the limit.
    """
    wrk = shutil.which("wrk")
    if wrk is None:
        command = bench.library("http-client", "stdlib", bench.load_core, port=server.port, clients=clients)
        command += ["--seconds", str(seconds), "--warmup", str(warmup)]
    else:
        script = bench.folder / "report.lua"
        script.write_text(WRK_REPORT)
        command = [
            "taskset",
            "-c",
            str(bench.load_core),
            wrk,
            "-t1",
            f"-c{clients}",
            f"-d{max(1, round(seconds))}s",
        ]
        command += ["-s", str(script), f"https://127.0.0.1:{server.port}/"]
    own, machine, cpu = children_cpu(), machine_cpu(), server.cpu()
    said = said_by(command, command[0], ANSWER_SECONDS)
    figures: dict[str, Any] = json.loads(said.splitlines()[-1])
    if figures.get("errors"):
        raise Failed(f"{figures['errors']} requests failed")
    used, own = server.cpu() - cpu, children_cpu() - own
    return {
        **figures,
        "generator": "wrk" if wrk else "http.client",
        "server_cpu": used,
        "generator_cpu": own,
        "other_cpu": machine_cpu() - machine - used - own,
    }


def children_cpu() -> float:
    """CPU seconds of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def machine_cpu() -> float:
    """CPU seconds of all cores so far, without idle and iowait (proc(5), /proc/stat)."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


class Broker:
    """Mosquitto with TLS, from `with` to the end of its block.  Raises Failed where it is not installed."""

    def __init__(self, bench: Bench) -> None:
        program = shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin")
        if program is None:
            raise Failed("no mosquitto (Debian: apt-get install mosquitto)")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        folder = Path(tempfile.mkdtemp(prefix="broker-"))
        cert, key = bench.identity("ecdsa")
        shutil.copy(key, folder / "key.pem")
        settings = f"listener {self.port} 127.0.0.1\nallow_anonymous true\nuser root\n"
        settings += f"certfile {cert}\nkeyfile {folder / 'key.pem'}\n"
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


@contextlib.contextmanager
def held(bench: Bench, server: Server, mode: str, connections: int) -> Iterator[Holder]:
    """A generator that holds *connections*, from its first report to the end of the block.  Raises Failed."""
    command = generator(bench, server, mode, connections=connections)
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        try:
            yield Holder(process, read_report(process))
        finally:
            process.stdin.close()
            try:
                process.wait(ANSWER_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


@dataclasses.dataclass(frozen=True)
class Holder:
    """A generator at work, and what it reported."""

    process: subprocess.Popen[bytes]
    report: dict[str, Any]

    def go_on(self) -> dict[str, Any]:
        """Tells it to, and returns its next report."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return read_report(self.process)


def read_report(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """One line of JSON.  Raises Failed."""
    assert process.stdout is not None and process.stderr is not None
    if not select.select([process.stdout], [], [], ANSWER_SECONDS)[0]:
        process.kill()
        raise Failed(f"the load generator said nothing for {ANSWER_SECONDS:.0f} s")
    line = process.stdout.readline()
    if not line:
        raise Failed(process.stderr.read().decode().strip())
    report: dict[str, Any] = json.loads(line)
    return report


def warm(bench: Bench, server: Server) -> None:
    """Lets a few sessions come and go, so that what a server loads once is not charged to those measured."""
    with held(bench, server, "idle", 8):
        pass


ACTIVE = 50
"""Sessions that talk among many that do not."""


def run_idle(bench: Bench, server: Server, connections: int, seconds: float) -> dict[str, Any]:
    """What *connections* idle sessions cost, each of which made one round trip, and what they cost others.

    The others are ACTIVE sessions that echo 64 bytes.  Raises Failed.
    """
    warm(bench, server)
    empty_cpu = cpu_over(server, seconds)
    rss, threads = server.rss(), server.threads()
    with held(bench, server, "idle", connections) as holder:
        idle_cpu = cpu_over(server, seconds)
        figures = {
            "rss_empty_kb": rss,
            "kb_per_session": (server.rss() - rss) / connections,
            "threads_per_session": (server.threads() - threads) / connections,
            "threads_empty": threads,
            "cpu_empty": empty_cpu,
            "cpu_idle": idle_cpu,
            "connections": connections,
            "opening_seconds": holder.report["handshake_seconds"],
        }
        active = run_load(bench, server, "echo", connections=ACTIVE, size=64, seconds=seconds, warmup=0.1)
    del active["connections"]
    return {**active, **figures}


def run_half_open(bench: Bench, server: Server, connections: int) -> dict[str, Any]:
    """How long a client waits that comes behind *connections* that began a handshake and went silent."""
    warm(bench, server)
    cpu = server.cpu()
    with held(bench, server, "half", connections) as holder:
        return {**holder.report, "server_cpu": server.cpu() - cpu, "threads": server.threads()}


BASE_SECONDS = 60.0
"""How long a server may take to forget clients that are gone."""


def run_vanish(bench: Bench, server: Server, connections: int) -> dict[str, Any]:
    """*connections* clients are gone at once: how long the next one waits, and until nothing is left of them."""
    warm(bench, server)
    time.sleep(SETTLE_SECONDS)
    threads, descriptors = server.threads(), server.descriptors()
    with held(bench, server, "vanish", connections) as holder:
        time.sleep(SETTLE_SECONDS)
        began = time.monotonic()
        report = holder.go_on()
        while server.threads() > threads or server.descriptors() > descriptors:
            if time.monotonic() - began > BASE_SECONDS:
                return {**report, "connections": connections}
            time.sleep(0.01)
        return {**report, "connections": connections, "base_ms": 1000 * (time.monotonic() - began)}
