"""The bridge in the stdlib's place: `inject`, `extract`, and programs that are run with it."""

from __future__ import annotations

import asyncio
import collections.abc
import os
import py_compile
import ssl
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import KeyPair
from dropin_rig import make_client_context, make_server_context
from peers import PATIENCE, Background

import bridge.ssl

pytestmark = pytest.mark.usefixtures("default_bridge")

ROOT = str(Path(__file__).parents[2])
ORIGINAL = [ssl.SSLContext]


@pytest.fixture(autouse=True)
def _extracted() -> object:
    yield
    bridge.ssl.extract()


def test_inject_and_extract_are_idempotent_and_complete() -> None:
    early = types.ModuleType("imported_early")
    early.SSLContext = early.renamed = ssl.SSLContext  # type: ignore[attr-defined]
    ours = types.ModuleType("uses_the_bridge")
    ours.SSLContext = bridge.ssl.SSLContext  # type: ignore[attr-defined]
    sys.modules.update({"imported_early": early, "uses_the_bridge": ours})
    try:
        for _ in range(2):
            bridge.ssl.inject()
            assert ssl.SSLContext is early.SSLContext is early.renamed is bridge.ssl.SSLContext
            assert isinstance(ssl.create_default_context(), bridge.ssl.SSLContext)
        for _ in range(2):
            bridge.ssl.extract()
            assert ssl.SSLContext is early.SSLContext is early.renamed is ORIGINAL[0]
            assert type(ssl.create_default_context()) is ORIGINAL[0]
            assert ours.SSLContext is bridge.ssl.SSLContext
    finally:
        del sys.modules["imported_early"], sys.modules["uses_the_bridge"]


@pytest.mark.parametrize("kind", ["original", "ours", "subclass"])
def test_every_setter_works_while_injected(kind: str) -> None:
    class Early(ORIGINAL[0]):  # type: ignore[misc]
        """Made before the injection, as many libraries make one."""

    bridge.ssl.inject()
    made = {"original": ORIGINAL[0], "ours": ssl.SSLContext, "subclass": Early}[kind]
    context = made(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_TICKET
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    assert context.minimum_version is context.maximum_version is ssl.TLSVersion.TLSv1_3
    assert isinstance(context.options, ssl.Options) and context.options & ssl.OP_NO_TICKET
    assert isinstance(context.verify_flags, ssl.VerifyFlags)
    assert context.verify_mode is ssl.CERT_NONE


def test_a_context_made_before_keeps_the_stdlibs_tls(
    ca_file: str, server_cert: KeyPair, background: Background
) -> None:
    before = make_client_context("theirs", ca_file)
    bridge.ssl.inject()
    server = make_server_context("ours", server_cert)
    address, (served,) = background.serve(lambda sock: server.wrap_socket(sock, server_side=True).close())
    import socket

    with before.wrap_socket(socket.create_connection(address, PATIENCE), server_hostname="localhost") as sock:
        assert type(sock) is ssl.SSLSocket
        assert sock.recv(1) == b""
    served.result(PATIENCE)


class Early(ssl.SSLContext):
    """A subclass of the stdlib's, from before the injection."""


def test_contexts_of_the_stdlib_are_instances_as_long_as_ours_are_in_their_place(
    ca_file: str, server_cert: KeyPair
) -> None:
    before = make_client_context("theirs", ca_file)
    bridge.ssl.inject()
    for context in (before, Early(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)):
        assert isinstance(context, ssl.SSLContext) and issubclass(type(context), ssl.SSLContext)
        assert not isinstance(context, Later) and not issubclass(type(context), Later)
    assert not isinstance(ssl, ssl.SSLContext) and not issubclass(ssl.SSLSocket, ssl.SSLContext)
    with pytest.raises(TypeError):
        issubclass(before, ssl.SSLContext)  # type: ignore[arg-type]
    if hasattr(asyncio.StreamWriter, "start_tls"):  # since Python 3.11
        assert asyncio.run(_start_tls(before, make_server_context("ours", server_cert))) == b"hello"
    bridge.ssl.extract()
    assert isinstance(Later(ssl.PROTOCOL_TLS_CLIENT), bridge.ssl.SSLContext)
    for context in (before, Early(ssl.PROTOCOL_TLS_CLIENT)):
        assert isinstance(context, ssl.SSLContext) and not isinstance(context, bridge.ssl.SSLContext)


async def _start_tls(client: ssl.SSLContext, server: ssl.SSLContext) -> bytes:
    """asyncio looks at the class of a context before it upgrades a connection."""

    async def greet(_: object, writer: asyncio.StreamWriter) -> None:
        await writer.start_tls(server)
        writer.write(b"hello")
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as listener:
        reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
        await writer.start_tls(client, server_hostname="localhost")
        data = await asyncio.wait_for(reader.read(), PATIENCE)
        writer.close()
        return data


class Later(bridge.ssl.SSLContext, collections.abc.Sized):
    """A subclass of ours, and of an abstract class too."""

    def __len__(self) -> int:
        return 0


def test_names_that_are_not_ours_are_the_stdlibs() -> None:
    for name in dir(ssl):
        assert hasattr(bridge.ssl, name), name
    assert bridge.ssl.CERT_REQUIRED is ssl.CERT_REQUIRED and bridge.ssl.SSLError is ssl.SSLError
    assert issubclass(bridge.ssl.SSLContext, ssl.SSLContext) and issubclass(
        bridge.ssl.SSLSocket, ssl.SSLSocket
    )
    for make in (bridge.ssl.create_default_context, bridge.ssl._create_unverified_context):
        assert type(make()) is bridge.ssl.SSLContext
    namespace: dict[str, object] = {}
    exec("from bridge.ssl import *", namespace)
    assert namespace["create_default_context"] is bridge.ssl.create_default_context
    assert namespace["SSLContext"] is bridge.ssl.SSLContext and namespace["PROTOCOL_TLS"] is ssl.PROTOCOL_TLS


PROGRAM = """
import ssl, sys, urllib.request
context = ssl.create_default_context(cafile=sys.argv[2])
with urllib.request.urlopen(sys.argv[1], context=context) as answer:
    print(type(context).__module__, answer.read().decode(), sys.argv[3:], __name__, flush=True)
sys.exit(3)
"""


@pytest.mark.parametrize("how", ["script", "module"])
def test_a_program_runs_unchanged_with_the_bridge_in_it(
    how: str, tmp_path: Path, ca_file: str, server_cert: KeyPair, background: Background
) -> None:
    def answer(sock: ssl.SSLSocket) -> None:
        assert sock.recv(65_536).startswith(b"GET / ")
        sock.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello")

    (tmp_path / "program.py").write_text(PROGRAM)
    address, (served,) = background.serve_tls(make_server_context("theirs", server_cert), answer)
    what = [str(tmp_path / "program.py")] if how == "script" else ["-m", "program"]
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "bridge",
            "run",
            *what,
            f"https://localhost:{address[1]}/",
            ca_file,
            "--x",
            "y",
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ROOT},
    )
    assert ran.stdout.strip() == "bridge.ssl.contexts hello ['--x', 'y'] __main__", ran.stderr
    assert ran.returncode == 3
    served.result(PATIENCE)


def test_run_ends_with_status_0_as_its_program_does(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import ssl; print(ssl.SSLContext.__module__)")
    ran = subprocess.run(
        [sys.executable, "-m", "bridge", "run", str(tmp_path / "program.py")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | {"PYTHONPATH": ROOT},
    )
    assert (ran.stdout, ran.returncode) == ("bridge.ssl.contexts\n", 0), ran.stderr


MAIN = """
import atexit, pickle, sys, threading
class Kept: pass
def keep(when): print(when, len(pickle.dumps(Kept())) > 0, flush=True)
def late():
    threading.main_thread().join()
    keep("late")
atexit.register(keep, "exit")
threading.Thread(target=late).start()
print(sys.argv[1:], sys.modules["__main__"].Kept is Kept, __builtins__.len is len)
"""


def run(*words: str, cwd: Path) -> tuple[str, int, str]:
    """What a program said that `tls-bridge run` ran, as the script that pip installs does."""
    start = "import sys; from bridge.cli import main; sys.path[0] = '/nowhere'; sys.exit(main())"
    ran = subprocess.run(
        [sys.executable, "-c", start, "run", *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": ROOT},
    )
    return ran.stdout, ran.returncode, ran.stderr


@pytest.mark.parametrize("how", ["script", "link", "compiled", "module", "package", "directory"])
def test_a_program_is_the_main_module_until_its_threads_and_exit_handlers_are_done(
    how: str, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text("from beside import *\n" + MAIN)
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(MAIN)
    os.symlink(tmp_path / "program.py", tmp_path / "elsewhere" / "link.py")
    compiled = py_compile.compile(str(tmp_path / "program.py"), str(tmp_path / "program.pyc"))
    assert compiled is not None
    words = {
        "script": ["program.py"],
        "link": ["elsewhere/link.py"],
        "compiled": [compiled],
        "module": ["-m", "program"],
        "package": ["-m", "package"],
        "directory": ["package"],
    }[how]
    assert run(*words, "x", cwd=tmp_path) == ("['x'] True True\nlate True\nexit True\n", 0, "")


FAILURES = {
    "an error": "def f():\n    1 / 0\nf()",
    "a chain": "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise KeyError from error",
    "no Exception": "class Odd(BaseException): pass\nraise Odd",
    "a SyntaxError": "x = (",
    "Ctrl-C": "import signal\nsignal.raise_signal(signal.SIGINT)",
    "sys.exit": "import sys\nsys.exit('so be it')",
    "a thread that tells of an error of its own": (
        "import sys, threading\n"
        "def late():\n"
        "    threading.main_thread().join()\n"
        "    try:\n"
        "        1 / 0\n"
        "    except ZeroDivisionError:\n"
        "        sys.excepthook(*sys.exc_info())\n"
        "threading.Thread(target=late).start()\n"
        "raise KeyError"
    ),
    "a hook": (
        "import sys, traceback\n"
        "sys.excepthook = lambda *error: print(traceback.extract_tb(error[2]))\n"
        "raise ValueError"
    ),
}
"""Ends of programs."""


@pytest.mark.parametrize("how", ["script", "module", "directory"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_program_that_fails_says_what_it_says_without_the_bridge(
    failure: str, how: str, tmp_path: Path
) -> None:
    (tmp_path / "package").mkdir()
    for path in (tmp_path / "program.py", tmp_path / "package" / "__main__.py"):
        path.write_text(FAILURES[failure])
    words = {"script": ["program.py"], "module": ["-m", "program"], "directory": ["package"]}[how]
    alone = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path
    )
    assert run(*words, cwd=tmp_path) == (alone.stdout, alone.returncode, alone.stderr)
    assert alone.returncode != 0


def test_run_of_a_missing_script_is_one_line_and_status_2(tmp_path: Path) -> None:
    said = f"tls-bridge run: error: cannot open {tmp_path / 'none.py'}: No such file or directory\n"
    assert run("none.py", cwd=tmp_path) == ("", 2, said)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="-P came with Python 3.11")
def test_a_path_that_python_was_to_leave_alone_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "uses.py").write_text("import sys; print('/nowhere' in sys.path, '' in sys.path)")
    (tmp_path / "uses.py").write_text("raise SystemExit('it is in the current directory')")
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "bridge", "run", "-m", "uses"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'first'}{os.pathsep}{ROOT}"},
    )
    assert (ran.stdout, ran.returncode, ran.stderr) == ("False False\n", 0, "")


def test_run_without_a_program_says_what_it_needs() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "bridge", "run"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | {"PYTHONPATH": ROOT},
    )
    assert ran.returncode == 2 and "script" in ran.stderr
