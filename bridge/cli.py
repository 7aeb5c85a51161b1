"""The command line: `tls-bridge echo`, a server to talk to; `tls-bridge demo`, the main job, live;
`tls-bridge connect`, a client; `tls-bridge trace`, what OpenSSL wants meanwhile; and `tls-bridge run`, which runs a
program with the bridge in the place of the stdlib's `ssl`.

Only the demo and the trace on a terminal use `rich` (the extra ``cli``), and it does without if that is not installed.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import dataclasses
import importlib.machinery
import io
import json
import os
import pkgutil
import runpy
import signal
import socket
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import bridge
from bridge import connect_command, demo, top, trace_command, window
from bridge.arguments import Positive, add_password, address, password, show_address

HANDLERS = 2
"""Handler threads of the echo server: under the GIL more than two only wait for each other."""
CLOSE_SECONDS = 5.0
"""How long sessions have to end politely once the echo server is told to stop."""
LOOK_EVERY = 0.1
"""Seconds between two looks at the demo's progress."""
UNREAD = 141
"""The exit status when nobody reads stdout any more: what shells call the death by SIGPIPE."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # help is there, if it was asked for
        super().exit(status, message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line *argv*, by default the process's, and return its exit status.

    0: all went well.  1: the demo found a fault, or could not go on.  2: unusable arguments, files or
    address; the reason is one line on stderr.
    3 to 6: connect and trace had no session (see `bridge.explain`).  130: interrupted.  141: nobody reads
    stdout, or stderr, any more.
    Raises SystemExit where argparse does.
    Echo catches signals, so it runs on the main thread only.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["run"] and words[1:] not in (["-h"], ["--help"]):
        return _run(words[1:])  # whose options are not ours
    _prepare_streams()
    name = "tls-bridge"
    try:
        arguments = _parser().parse_args(words)
        name = f"{name} {arguments.command}"
        status = _COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _let_go()
        return UNREAD
    except bridge.ConfigurationError as error:
        reason = str(error)
    except (bridge.BridgeError, RuntimeError) as error:  # the latter if no more threads can be had
        return _complain(f"{name}: {type(error).__name__}: {error}", 1)
    except OSError as error:
        _let_go()
        reason = error.strerror or str(error)
        if error.filename is not None:
            reason = f"{error.filename}: {reason}"
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    return _complain(f"{name}: error: {reason}", 2)


def _complain(text: str, status: int) -> int:
    """Say *text* on stderr, if that can be.  *status*, or that nobody reads it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        _let_go()
        return UNREAD
    except OSError:
        _let_go()
    return status


def _prepare_streams() -> None:
    """Stand in for standard streams that are closed, and have stdout take every character in some way."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _let_go() -> None:
    """Have nobody take what stdout and stderr hold, if it cannot be written: Python would try again at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


# Arguments.


def _parser() -> _Parser:
    parser = _Parser(prog="tls-bridge", description="TLS for threaded programs.")
    parser.add_argument("--version", action="version", version=f"tls-bridge {bridge.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_echo(commands.add_parser("echo", help="serve TLS and send back whatever comes"))
    _add_demo(commands.add_parser("demo", help="many threads on real TLS sessions, every byte checked"))
    _add_top(commands.add_parser("top", help="what the sessions of a running process are doing, live"))
    connect_command.add_arguments(
        commands.add_parser("connect", help="talk to a TLS server, and say who it is")
    )
    trace_command.add_arguments(commands.add_parser("trace", help="show what OpenSSL wants, and when"))
    _add_run(commands.add_parser("run", help="run a Python program, its TLS the bridge's"))
    return parser


def _add_echo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Serve TLS and send every byte back. Prints `listening on HOST:PORT` once it does. SIGINT or SIGTERM "
        "end it."
    )
    parser.add_argument(
        "--listen", type=address, required=True, metavar="HOST:PORT", help="port 0: any; IPv6: [::1]:8443"
    )
    parser.add_argument("--cert", required=True, metavar="PEM", help="the certificate, then its chain")
    parser.add_argument("--key", required=True, metavar="PEM", help="its private key")
    add_password(parser)
    parser.add_argument("--workers", type=Positive(int), metavar="N", help="default: one a core, at most 4")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Many threads send and receive at both ends of real TLS sessions on loopback, with a throw-away CA;"
        " every message is checked byte for byte. Exit status 1 if one is wrong or missing. Shows live"
        " progress on a terminal if rich is there: pip install 'tls-bridge[cli]'."
    )
    plan = demo.Plan()
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--seconds",
        type=Positive(float),
        metavar="S",
        help=f"for how long to send (default {plan.seconds:g})",
    )
    amount.add_argument(
        "--megabytes", type=Positive(float), metavar="M", help="how much to send, both ways together"
    )
    parser.add_argument(
        "--clients", type=Positive(int), default=plan.clients, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--tls", choices=list(demo.VERSIONS), default=plan.tls, help="default: %(default)s")
    parser.add_argument(
        "--seed", type=int, default=plan.seed, metavar="N", help="of the messages (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print nothing but the result, as JSON")


def _add_top(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Look through the window that a running program has opened with bridge.window.Window(b, PATH): its"
        " sessions, fullest queues first. Live on a terminal, if rich is there; else once, as text. Ctrl-C ends it."
    )
    parser.add_argument("path", metavar="PATH", help="the window: a Unix socket")
    parser.add_argument(
        "--every", type=Positive(float), default=1.0, metavar="S", help="seconds (default: %(default)g)"
    )
    parser.add_argument("--json", action="store_true", help="print what is to be seen, once, as JSON")


def _add_run(parser: _Parser) -> None:
    parser.usage = "%(prog)s SCRIPT [ARG ...] | %(prog)s -m MODULE [ARG ...]"
    parser.description = (
        "Run a Python program as `python` would, but whenever it or one of its libraries makes an"
        " ssl.SSLContext, it gets the bridge's."
    )


# Run.


def _run(words: list[str]) -> int:
    from bridge import ssl

    if not words or words == ["-m"]:
        _parser().error("run needs the path of a script, or -m and a module")
    ssl.inject()
    safe = bool(getattr(sys.flags, "safe_path", sys.flags.isolated))  # then Python adds nothing to the path
    if not safe:
        del sys.path[0]  # our own folder
    # It stays there: a program's threads and exit handlers outlive its last line.
    program = sys.modules["__main__"] = types.ModuleType("__main__")
    vars(program)["__builtins__"] = builtins
    try:
        return _run_program(words, program, safe)
    except BaseException as error:
        _begin_with_the_program(error)
        raise


def _begin_with_the_program(error: BaseException) -> None:
    """Have the traceback of *error*, which ends the program, begin where Python's would."""
    traceback, hook = error.__traceback__, sys.excepthook
    while traceback is not None and traceback.tb_frame.f_code.co_filename == _run.__code__.co_filename:
        traceback = traceback.tb_next

    def tell(kind: type[BaseException], other: BaseException, its: types.TracebackType | None) -> None:
        if other is error:  # and not what a thread that is left has to tell
            other, its = error.with_traceback(traceback), traceback
        hook(kind, other, its)

    sys.excepthook = tell


def _run_program(words: list[str], program: types.ModuleType, safe: bool) -> int:
    if words[0] == "-m":
        sys.argv = words[1:]
        if not safe:
            sys.path.insert(0, os.getcwd())
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]
        return 0
    sys.argv = words
    if pkgutil.get_importer(words[0]) is not None:  # a directory or a zip file with a __main__.py
        sys.path.insert(0, os.path.abspath(words[0]))
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
        return 0
    return _run_script(os.path.abspath(words[0]), program, safe)


def _run_script(path: str, program: types.ModuleType, safe: bool) -> int:
    compiled = path.endswith(".pyc")
    kind: Any = importlib.machinery.SourcelessFileLoader if compiled else importlib.machinery.SourceFileLoader
    loader = kind("__main__", path)
    try:
        content = loader.get_data(path)
    except OSError as error:
        return _complain(f"tls-bridge run: error: cannot open {path}: {error.strerror}", 2)
    code = loader.get_code("__main__") if compiled else compile(content, path, "exec", dont_inherit=True)
    vars(program).update(__file__=path, __loader__=loader, __cached__=None)
    if not safe:
        sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    exec(code, vars(program))
    return 0


# Top.


def _top(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps(window.look(arguments.path), indent=2))
    elif _is_lively():
        top.watch(arguments.path, arguments.every)
    else:
        print(top.plain(window.look(arguments.path)))
    return 0


# Echo.


def _echo(arguments: argparse.Namespace) -> int:
    context = bridge.server_context(arguments.cert, arguments.key, password=password(arguments))
    inbox = bridge.Inbox()
    with _asked_to_end() as asked:
        b = bridge.Bridge(workers=arguments.workers)
        try:
            listener = b.listen(arguments.listen, context, inbox=inbox)
            for _ in range(HANDLERS):
                _start_handler(inbox)
            print(f"listening on {show_address(listener.address)}", flush=True)
            asked.recv(1)
        finally:
            b.close(CLOSE_SECONDS)  # which ends the handlers
    return 0


@contextlib.contextmanager
def _asked_to_end() -> Iterator[socket.socket]:
    """A socket that has something to read once SIGINT or SIGTERM has come.  Main thread only.

    CPython looks for signals before it falls asleep and not while: one that comes just between lets it sleep on, but
    for what its wakeup descriptor wakes.
    """
    asked, ask = socket.socketpair()
    with asked, ask:
        ask.setblocking(False)
        before = signal.set_wakeup_fd(ask.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        try:
            yield asked
        finally:
            signal.set_wakeup_fd(before)


def _start_handler(inbox: bridge.Inbox) -> None:
    threading.Thread(target=_handle, args=(inbox,), name="echo-handler").start()


def _handle(inbox: bridge.Inbox) -> None:
    """A handler's life.  One that has to wait for its peer has another take its place, and leaves after that.

    So peers that do not read keep a thread each waiting, and never a handler from the others.
    """
    with contextlib.suppress(bridge.ShutDown):
        while True:
            session, message = inbox.get()
            if message is None:  # the peer has said all; asking for the next closes the session
                continue
            try:
                session.send(message, timeout=0)
            except bridge.SendTimeout:
                _start_handler(inbox)
                with contextlib.suppress(bridge.SessionEnded):
                    session.send(message)
                return
            except bridge.SessionEnded:
                continue


# Demo.


def _demo(arguments: argparse.Namespace) -> int:
    default = demo.Plan()
    plan = demo.Plan(
        seconds=arguments.seconds or (None if arguments.megabytes else default.seconds),
        megabytes=arguments.megabytes,
        clients=arguments.clients,
        tls=arguments.tls,
        seed=arguments.seed,
    )
    live = _is_lively()
    if not arguments.json:
        print(_headline(plan), flush=True)
    with demo.Run(plan) as run:
        if arguments.json:
            run.wait(None)
        elif live:
            _watch_live(run)
        else:
            _watch_plainly(run)
        result = run.result()
    if arguments.json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
    else:
        _show(result, live)
    return 0 if result.ok else 1


def _is_lively() -> bool:
    """Whether stdout is a terminal, and one on which `rich`, if it is there, draws again where it has drawn."""
    if not sys.stdout.isatty():
        return False
    try:
        from rich.console import Console
    except ImportError:
        return False
    console = Console()
    return console.is_terminal and not console.is_dumb_terminal


def _watch_plainly(run: demo.Run) -> None:
    while not run.wait(1.0):
        print(_progress(run), flush=True)


def _watch_live(run: demo.Run) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    with Live(transient=True) as live:
        done = False
        while not done:
            done = run.wait(LOOK_EVERY)
            bar = ProgressBar(total=1.0, completed=min(1.0, _fraction(run)), width=60)
            live.update(Group(bar, Text(_progress(run))))


def _headline(plan: demo.Plan) -> str:
    amount = f"{plan.megabytes:g} MB" if plan.megabytes else f"{plan.seconds:g} seconds"
    threads = 2 * (demo.SENDERS + demo.RECEIVERS)
    versions = " and ".join(demo.VERSIONS[plan.tls])
    return (
        f"{amount} of messages on {plan.clients} links ({versions}), {threads} threads each, seed {plan.seed}"
    )


def _fraction(run: demo.Run) -> float:
    if run.plan.megabytes:
        return run.received().bytes / (run.plan.megabytes * 1e6)
    return run.elapsed() / (run.plan.seconds or 1.0)


def _progress(run: demo.Run) -> str:
    received, wants = run.received(), sum(sum(row.values()) for row in run.wants().values())
    return (
        f"{run.elapsed():4.1f} s {received.messages:>9,} messages, {_megabytes(received.bytes)} checked,"
        f" {wants:,} wants, {run.asked:,} renegotiations"
    )


@dataclasses.dataclass(frozen=True)
class _Table:
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def plainly(self) -> str:
        """As text: the first column to the left, the others to the right."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            )
            for row in (self.columns, *self.rows)
        ]
        return "\n".join(["", self.title, "-" * len(lines[0]), lines[0], "-" * len(lines[0]), *lines[1:]])


def _show(result: demo.Result, live: bool) -> None:
    tables = [_links_table(result), _wants_table(result)]
    verdict = ["", *_facts(result), "", *result.faults]
    verdict.append(
        "Every message arrived once, in order, and right in every byte."
        if result.ok
        else "SOMETHING IS WRONG."
    )
    if not live:
        print("\n".join([*(table.plainly() for table in tables), *verdict]))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for table in tables:
        shown = Table(title=table.title, title_justify="left")
        for index, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if index else "left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for line in verdict[:-1]:
        console.print(Text(line), soft_wrap=True)
    console.print(Text(verdict[-1], "bold green" if result.ok else "bold red"))


def _links_table(result: demo.Result) -> _Table:
    rows: list[tuple[str, ...]] = [
        (
            f"link {number}",
            link.tls,
            "tiny" if link.tiny_buffers else "normal",
            *_traffic(link.to_server),
            *_traffic(link.to_client),
        )
        for number, link in enumerate(result.links, 1)
    ]
    totals = [
        demo.Traffic(sum(way.messages for way in ways), sum(way.bytes for way in ways))
        for ways in zip(*((link.to_server, link.to_client) for link in result.links), strict=True)
    ]
    rows.append(("together", "", "", *_traffic(totals[0]), *_traffic(totals[1])))
    columns = ("", "version", "buffers", "to the server", "", "to the client", "")
    return _Table("Received, and compared byte for byte", columns, rows)


def _traffic(traffic: demo.Traffic) -> tuple[str, str]:
    return f"{traffic.messages:,}", _megabytes(traffic.bytes)


def _wants_table(result: demo.Result) -> _Table:
    rows: list[tuple[str, ...]] = [
        (_CALLS.get(call, call), f"{wants['read']:,}", f"{wants['write']:,}")
        for call, wants in sorted(result.wants.items())
    ]
    seen = result.wants_seen_by_application
    rows.append(("the application saw", f"{seen['read']:,}", f"{seen['write']:,}"))
    return _Table("How often OpenSSL asked to wait", ("in", "WANT_READ", "WANT_WRITE"), rows)


_CALLS = {
    "handshake": "SSL_do_handshake",
    "read": "SSL_read",
    "write": "SSL_write",
    "shutdown": "SSL_shutdown",
    "flush": "kernel, rest of a record",
}


def _facts(result: demo.Result) -> Iterator[str]:
    links = len(result.links)
    yield (
        f"{result.application_threads} application threads, {2 * links} sessions,"
        f" {result.bridge_threads} threads of the two bridges."
    )
    if any(link.tls == "TLSv1.2" for link in result.links):
        yield (
            f"TLS 1.2: {result.renegotiations_done:,} renegotiations under full load"
            f" (asked for {result.renegotiations_asked_for:,} times, also while one was under way)."
        )
    if any(link.tls == "TLSv1.3" for link in result.links):
        yield "TLS 1.3: no renegotiation, and pyOpenSSL has no way to ask for its KeyUpdate."
    yield f"{result.resumed_handshakes} of {links} handshakes resumed the session of an earlier visit."
    yield (
        f"{result.messages:,} messages, {_megabytes(result.bytes)} in {result.seconds:.1f} s:"
        f" {_megabytes(int(result.bytes_per_second))}/s."
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


_COMMANDS = {
    "echo": _echo,
    "demo": _demo,
    "connect": connect_command.run,
    "trace": trace_command.run,
    "top": _top,
}
