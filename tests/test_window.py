"""A window into a process: who may look, what is to be seen, and that nobody keeps it from closing."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import select
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import KeyPair
from peers import Background, until
from rig import PATIENCE, Clock, forks

import bridge
from bridge import cli, top
from bridge.window import Window, look


@pytest.fixture
def path() -> Iterator[Path]:
    """Where a window may be: the path of a Unix socket must be short."""
    with tempfile.TemporaryDirectory(prefix="bridge-") as folder:
        yield Path(folder) / "window"


@pytest.fixture
def talking(server_cert: KeyPair, ca_file: str) -> Iterator[bridge.Bridge]:
    """A Bridge with a client and a server, which has 1,000 bytes to read."""
    with bridge.Bridge(workers=2) as b:
        listener = b.listen(
            ("127.0.0.1", 0), bridge.server_context(server_cert.certfile, server_cert.keyfile)
        )
        session = b.connect(listener.address, bridge.client_context(ca_file), server_hostname="localhost")
        peer = listener.accept(PATIENCE)
        session.send(bytes(1000))
        peer.peek(PATIENCE)
        yield b
        assert session.end is peer.end is None


def test_a_window_shows_what_a_snapshot_does_and_nothing_after_it(talking: bridge.Bridge, path: Path) -> None:
    with Window(talking, path):
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        for _ in range(3):
            view = look(path)
            assert {one["name"] for one in view["sessions"]} == {s.name for s in talking.snapshot().sessions}
            assert view["bytes_received"] == 1000 and view["pid"] == os.getpid()
            assert sorted(view["handshakes"]) == [
                ["client", "ok", "TLSv1.3", 1],
                ["server", "ok", "TLSv1.3", 1],
            ]
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        look(path)


def test_a_looker_who_does_not_look_holds_up_nobody(talking: bridge.Bridge, path: Path) -> None:
    with Window(talking, path) as window, socket.socket(socket.AF_UNIX) as idle:
        idle.connect(str(path))
        assert look(path)["workers"] == ["bridge-worker-0", "bridge-worker-1"]
        window.close()
        window.close()


def test_a_window_replaces_a_dead_socket_and_nothing_else(talking: bridge.Bridge, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    with Window(talking, path):
        with pytest.raises(OSError, match="cannot show anything"):
            Window(talking, path)  # somebody shows something there
        assert look(path)["sessions"]
    path.write_text("precious")
    with pytest.raises(OSError, match="cannot show anything"):
        Window(talking, path)
    assert path.read_text() == "precious"


def test_a_socket_whose_owner_does_not_accept_is_left_to_it(talking: bridge.Bridge, path: Path) -> None:
    with contextlib.ExitStack() as stack:
        busy = stack.enter_context(socket.socket(socket.AF_UNIX))
        busy.bind(str(path))
        busy.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(str(path))
        with pytest.raises(OSError, match="cannot show anything.*in use"):
            Window(talking, path)
        assert path.exists()


def test_a_window_outlives_a_want_of_descriptors(talking: bridge.Bridge, path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Window(talking, path):
        first, second = (socket.socket(socket.AF_UNIX) for _ in range(2))
        with first, second:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                first.connect(str(path))  # for whom the kernel may have one already
                second.connect(str(path))
                second.settimeout(0.5)
                with pytest.raises(TimeoutError):
                    second.recv(1)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for looker in (first, second):
                looker.settimeout(PATIENCE)
                assert looker.recv(1) == b"{"


def test_a_window_that_closes_leaves_the_path_to_a_successor(
    talking: bridge.Bridge, path: Path, background: Background
) -> None:
    successors: list[Window] = []

    def succeed() -> bool:
        with contextlib.suppress(OSError):
            successors.append(Window(talking, path))
        return bool(successors)

    with Window(talking, path) as window, socket.socket(socket.AF_UNIX) as slow:
        window._view = lambda: {"sessions": "x" * 10_000_000}  # type: ignore[method-assign]
        slow.connect(str(path))
        slow.recv(1)
        closing = background.run(window.close)  # which waits for its looker
        until(succeed)
        with successors[0]:
            slow.close()
            closing.result(PATIENCE)
            assert look(path)["sessions"]


def test_a_window_whose_path_was_given_to_another_leaves_it_there(talking: bridge.Bridge, path: Path) -> None:
    with Window(talking, path) as window:
        path.unlink()
        with Window(talking, path):
            window.close()
            window.close()
            assert look(path)["sessions"]


def test_a_path_that_is_too_long_is_said_to_be(talking: bridge.Bridge, path: Path) -> None:
    with pytest.raises(OSError, match="cannot show anything at .*: AF_UNIX path too long") as caught:
        Window(talking, f"{path}{'x' * 200}")
    assert caught.value.errno == errno.ENAMETOOLONG


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
@forks
def test_a_child_that_closes_a_window_leaves_it_to_the_parent(talking: bridge.Bridge, path: Path) -> None:
    with Window(talking, path) as window:
        child = os.fork()
        if child == 0:
            try:
                window.close()
                window.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert look(path)["pid"] == os.getpid()
    assert not path.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
@forks
def test_a_child_that_lives_on_keeps_no_looker_from_the_end(talking: bridge.Bridge, path: Path) -> None:
    with Window(talking, path) as window, socket.socket(socket.AF_UNIX) as looker:
        window._view = lambda: {"sessions": "x" * 3_000_000}  # type: ignore[method-assign]
        looker.settimeout(PATIENCE)
        looker.connect(str(path))
        assert looker.recv(1) == b"{"  # and the rest is still under way
        over, alive = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(alive)
                os.read(over, 1)
            finally:
                os._exit(0)
        try:
            while looker.recv(65536):
                pass
        finally:
            os.close(alive)
            os.close(over)
            os.waitpid(child, 0)


@pytest.mark.parametrize("said", [b"", b"hello", b"{}", b"[1]", b"[" * 100_000], ids=lambda said: said[:5])
def test_top_of_what_is_no_window_is_one_line(
    said: bytes, path: Path, background: Background, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            with listener.accept()[0] as looker:
                looker.sendall(said)

        answered = background.run(answer)
        assert cli.main(["top", str(path)]) == 2
        answered.result(PATIENCE)
    shown = capsys.readouterr().err
    assert shown == f"tls-bridge top: error: {path}: this is no window, or one that is just closing\n"


def test_top_shows_names_as_they_are_and_nothing_that_moves_the_cursor(
    server_cert: KeyPair, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = pytest.importorskip("rich.console").Console(width=400, file=io.StringIO())
    context = bridge.server_context(server_cert.certfile, server_cert.keyfile)
    with bridge.Bridge(workers=1) as b, socket.socket(socket.AF_UNIX) as client:
        listener = b.listen(f"{path}s", context)
        client.bind(f"{path}c\x1b[31m[red] [")
        client.connect(listener.address)
        until(lambda: b.snapshot().sessions)
        with Window(b, path):
            assert cli.main(["top", str(path)]) == 0
            console.print(top.shown(look(path)))
    for shown in (capsys.readouterr().out, console.file.getvalue()):
        assert "windowc\N{REPLACEMENT CHARACTER}[31m[red] [" in shown and "\x1b" not in shown


def test_top_prints_it(talking: bridge.Bridge, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Window(talking, path):
        assert cli.main(["top", str(path)]) == 0
        said = capsys.readouterr().out
        first, *_ = (line for line in said.splitlines() if "worker-" in line)
        assert "2 sessions, handshakes 2 ok and 0 failed, received 1,000 bytes" in said
        assert "open" in first and "read: read" in first and "1,000" in first, "the fullest comes first"
        assert cli.main(["top", str(path), "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["sessions"]) == 2


@pytest.mark.parametrize("kind", ["nothing", "a file", "a dead socket", "below a file"])
def test_top_of_where_no_window_is_says_where_and_why(
    kind: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "a dead socket":
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    elif kind != "nothing":
        path.touch()
    path = path / "window" if kind == "below a file" else path
    assert cli.main(["top", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"tls-bridge top: error: {path}: ")
    assert said.endswith("; no program has opened a Window there, or it has ended\n")


def test_top_of_a_path_that_cannot_be_one_says_so(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = path.with_name("x" * 200)
    assert cli.main(["top", str(path)]) == 2
    assert capsys.readouterr().err == f"tls-bridge top: error: {path}: AF_UNIX path too long\n"


def test_who_looks_at_an_owner_that_does_not_answer_is_told_so(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(path))
        mute.listen()
        with pytest.raises(TimeoutError, match=f"does not answer.*{path}"):
            look(path, timeout=0.05)


def test_who_looks_at_what_talks_without_end_is_told_so_in_time(path: Path, background: Background) -> None:
    with socket.socket(socket.AF_UNIX) as log:
        log.bind(str(path))
        log.listen()
        looking = background.run(look, path, 0.5)
        with log.accept()[0] as looker, contextlib.suppress(BrokenPipeError):
            for _ in range(50):
                looker.sendall(b"x")
                select.select([], [], [], 0.05)
            pytest.fail("it goes on to look")
    with pytest.raises(TimeoutError, match=f"does not answer.*{path}"):
        looking.result(PATIENCE)


def test_many_may_wait_for_a_slow_looker(talking: bridge.Bridge, path: Path) -> None:
    with Window(talking, path) as window, contextlib.ExitStack() as crowd:
        window._view = lambda: {"sessions": "x" * 3_000_000}  # type: ignore[method-assign]
        slow = crowd.enter_context(socket.socket(socket.AF_UNIX))
        slow.connect(str(path))
        assert slow.recv(1) == b"{"
        for _ in range(40):
            waiting = crowd.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            waiting.connect(str(path))


def test_who_looks_at_a_window_that_closes_is_told_so(path: Path, background: Background) -> None:
    with socket.socket(socket.AF_UNIX) as closing:
        closing.bind(str(path))
        closing.listen()
        looking = background.run(look, path)
        select.select([closing], [], [], PATIENCE)
    with pytest.raises(OSError, match="just closing"):
        looking.result(PATIENCE)


@contextlib.contextmanager
def top_on_a_terminal(
    term: str, path: Path, *options: str
) -> Iterator[tuple[subprocess.Popen[bytes], io.FileIO]]:
    """`tls-bridge top` in another process, and the other end of its terminal."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": term, "COLUMNS": "120", "LINES": "30"}
    environment["PYTHONPATH"] = str(Path(bridge.__file__).parents[1])
    command = [sys.executable, "-m", "bridge", "top", str(path), *options]
    with (
        open(ours, "rb", buffering=0) as screen,
        subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, env=environment) as process,
    ):
        os.close(theirs)
        try:
            yield process, screen
        finally:
            process.kill()


def test_top_is_live_on_a_terminal_until_the_window_closes(talking: bridge.Bridge, path: Path) -> None:
    pytest.importorskip("rich")
    with (
        Window(talking, path) as window,
        top_on_a_terminal("xterm", path, "--every", "0.1") as (process, screen),
    ):
        seen = b""
        while b"1,000" not in seen:
            seen += screen.read(65536)
        window.close()
        _, err = process.communicate(timeout=PATIENCE)
    gone = f"process {os.getpid()} has ended, or has closed its window"
    assert (process.returncode, err.decode()) == (2, f"tls-bridge top: error: {path}: {gone}\n")


def test_top_that_can_look_no_more_does_not_blame_the_process(talking: bridge.Bridge, path: Path) -> None:
    pytest.importorskip("rich")
    with Window(talking, path), top_on_a_terminal("xterm", path, "--every", "0.1") as (process, screen):
        seen = b""
        while b"1,000" not in seen:
            seen += screen.read(65536)
        loop = path.with_name("loop")
        loop.symlink_to(path)
        loop.replace(path)
        _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err.decode()) == (
        2,
        f"tls-bridge top: error: {path}: {os.strerror(errno.ELOOP)}\n",
    )


def test_top_ends_with_its_terminal(talking: bridge.Bridge, path: Path) -> None:
    pytest.importorskip("rich")
    with Window(talking, path), top_on_a_terminal("xterm", path, "--every", "0.5") as (process, screen):
        seen = b""
        while b"1,000" not in seen.partition(b"session")[2]:  # the table is there, and top pauses
            seen += screen.read(65536)
        screen.close()
        process.communicate(timeout=PATIENCE)


def test_top_on_a_terminal_that_cannot_be_drawn_on_is_text(talking: bridge.Bridge, path: Path) -> None:
    with Window(talking, path), top_on_a_terminal("dumb", path) as (process, screen):
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 0 and b"received 1,000 bytes" in screen.read(65536)


def test_rates_are_of_the_time_that_passed_between_two_looks(
    talking: bridge.Bridge, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    clock, screen = Clock(), io.StringIO()
    with Window(talking, path) as window:
        real = window._view()
        looks = iter(range(3))

        def view() -> dict[str, Any]:
            clock.now += 2
            number = next(looks, None)
            if number is None:
                raise OSError
            return real | {"bytes_received": 1000 * number, "bytes_sent": 0}

        monkeypatch.setattr(window, "_view", view)
        monkeypatch.setattr(top, "time", clock)
        monkeypatch.setattr(screen, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setenv("TERM", "xterm")
        with pytest.raises(OSError, match="has closed its window"):
            top.watch(str(path), 1e-9)
    assert "now 500 and 0 a second" in " ".join(screen.getvalue().split())
