"""The command `tls-bridge trace`: a handshake, an exchange and a close with a server, as a timeline."""

from __future__ import annotations

import argparse
import os
import sys

import bridge
from bridge.arguments import add_peer, open_session, show_address, silence
from bridge.connect_command import printable
from bridge.explain import explain
from bridge.starttls import Refused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.description = (
        "Make a real session with a TLS server and show what OpenSSL was asked and answered, what it wanted,"
        " how long threads slept and what woke them, and which records and messages passed; sizes and names"
        " only. The exit status is that of `tls-bridge connect`."
    )
    add_peer(parser)
    parser.add_argument("--send", metavar="TEXT", help=r"what to say; \r, \n and \t are understood")
    parser.add_argument(
        "--wait",
        type=silence,
        default=1.0,
        metavar="S",
        help="seconds of silence until it closes (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, nothing else")
    parser.add_argument("--svg", metavar="FILE", help="write a picture, too")


def run(arguments: argparse.Namespace) -> int:
    """Do it; the exit status.  ConfigurationError or OSError for unusable arguments."""
    where, settled, status = show_address(arguments.address), False, 0
    sentence = ""
    if arguments.svg:
        _write(arguments.svg, "a", "")  # if that cannot be, it is said before anything is done
    with bridge.trace() as seen:
        try:
            with bridge.Bridge(workers=1) as b, open_session(b, arguments) as session:
                settled = True
                _exchange(session, arguments)
        except bridge.ConfigurationError:
            raise
        except (bridge.BridgeError, OSError, Refused) as error:
            status, sentence = explain(error, where, settled)
    if arguments.json:
        sys.stdout.write(seen.json_lines())
    else:
        _show(seen)
    if arguments.svg:
        _write(arguments.svg, "w", seen.svg())
    if sentence:
        print(f"tls-bridge trace: {printable(sentence)}", file=sys.stderr)
    return status


def _write(path: str, mode: str, text: str) -> None:
    try:
        with open(path, mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        error.filename = path  # which only `open` tells
        raise


def _exchange(session: bridge.Session, arguments: argparse.Namespace) -> None:
    if arguments.send:
        text = arguments.send
        for escape, meaning in ((r"\r", "\r"), (r"\n", "\n"), (r"\t", "\t")):
            text = text.replace(escape, meaning)
        session.send(os.fsencode(text))  # the bytes of the command line
    try:
        while True:
            session.recv(timeout=arguments.wait)
    except (bridge.ReceiveTimeout, bridge.EndOfStream):
        session.close(arguments.timeout)


def _show(seen: bridge.Trace) -> None:
    events = sorted(seen.events, key=lambda event: event.at)
    rows = [(f"{event.at * 1000:.2f}", event.lane, event.session, printable(str(event))) for event in events]
    if sys.stdout.isatty() and _show_richly(rows):
        return
    print(f"{'ms':>10}  {'thread':<12}{'session':<10}what")
    for at, lane, session, what in rows:
        print(f"{at:>10}  {lane:<12}{session:<10}{what}")


def _show_richly(rows: list[tuple[str, str, str, str]]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table("ms", "thread", "session", "what", box=None)
    table.columns[0].justify = "right"
    for at, lane, session, what in rows:
        table.add_row(at, lane, session, Text(what, _style(what)))
    Console(no_color="NO_COLOR" in os.environ).print(table)
    return True


def _style(what: str) -> str:
    if "WANT_" in what:
        return "yellow"
    if what.startswith("slept"):
        return "dim"
    return "cyan" if what.startswith(("sent", "received")) else ""
