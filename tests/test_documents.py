"""What README and docs show happens, word for word: each page from top to bottom, in one namespace."""

from __future__ import annotations

import base64
import code
import contextlib
import importlib
import io
import os
import re
import shlex
import ssl
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import trustme
from peers import Background

import bridge

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if re.search(r"^```(python|console)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]
FILES = {"cert": "localhost", "new-cert": "localhost", "client": "alice@example.org"}


@pytest.fixture
def workplace(ca: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current directory with the files that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    ca.cert_pem.write_to_path("ca.pem")
    Path("server.py").write_text("import ssl; assert 'bridge' in ssl.SSLContext.__module__")
    for name, identity in FILES.items():
        issued = ca.issue_cert(identity)
        issued.cert_chain_pems[0].write_to_path(f"{name}.pem")
        issued.private_key_pem.write_to_path(
            f"{name.replace('cert', 'key') if 'cert' in name else f'{name}-key'}.pem"
        )


BLOCK = re.compile(r"^```(python|console|output)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMISE = re.compile(r"^ *print\(.*\)  # (.+?)(?:: .*)?$", re.MULTILINE)
"""What a line prints: all of its comment, or what stands before a colon."""
ELSEWHERE = (
    "pip install",  # the extras are looked up below; tox installs all of them
    "tox",
    "python -m bridge run -m gunicorn",  # serves until it is stopped: tests/dropin/test_wsgi_servers.py
)
PROGRAMS = {"tls-bridge": [sys.executable, "-m", "bridge"], "python": [sys.executable]}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(bridge.__file__).parents[1])}


@pytest.mark.usefixtures("default_bridge", "workplace")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_this_page_shows_happens(page: Path, background: Background, openssl: str) -> None:
    """Its code runs, its commands succeed, and both print what it says."""
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": page.stem}
    printed: list[str] = []
    for block in BLOCK.finditer(text):
        kind, body = block.groups()
        if kind == "python":
            above = "\n" * text.count(
                "\n", 0, block.start(2)
            )  # so that a traceback shows the page's own line
            with contextlib.redirect_stdout(io.StringIO()) as said:
                exec(compile(above + body, str(page), "exec"), namespace)
            printed = said.getvalue().splitlines()
            for promise in PROMISE.findall(body):
                assert promise in printed, f"{page.name} promises {promise}"
        elif kind == "console":
            for command in (part for line in body.splitlines() for part in line.split(" && ")):
                if not command.startswith(ELSEWHERE):
                    run_command(command, background, openssl)
        else:
            shown = [_steady(line) for line in printed]
            for line in body.splitlines():
                assert _steady(line) in shown, f"{page.name} shows {line}"


def run_command(command: str, background: Background, openssl: str) -> None:
    """Run *command* as it stands, and let it succeed; example.org:443 is a server of ours."""
    if "example.org:443" in command:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain("cert.pem", "key.pem")
        address, _ = background.serve_tls(context, _answer)
        command = command.replace("example.org:443", f"localhost:{address[1]} --cafile ca.pem")
    first, *rest = shlex.split(command)
    done = subprocess.run(
        [*PROGRAMS.get(first, [openssl if first == "openssl" else first]), *rest],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def _answer(sock: ssl.SSLSocket) -> None:
    if sock.recv(1000):
        sock.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
    with contextlib.suppress(OSError):
        sock.unwrap()


def _steady(line: str) -> str:
    """What is the same each time: all of a metric, and of other lines all but the numbers."""
    return line if line.startswith("tls_bridge_") else re.sub(r"\d+(?:[.:]\d+)*", "N", line)


@pytest.mark.usefixtures("workplace")
def test_the_session_that_is_traced_in_the_docs_closes_without_a_wait() -> None:
    page = (ROOT / "docs" / "howto" / "trace.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0], namespace)
    seen: bridge.Trace = namespace["seen"]
    assert seen.events
    assert [str(event) for event in seen.events if event.outcome == "a deadline"] == []


PICTURES = {
    "echo": ["ClientHello", "SSL_write → 5 B", "close_notify"],
    "silence": ["SSL_read → WANT_READ", "→ socket readable", "SSL_read → 5 B"],
    "stalled_write": ["SSL_write → WANT_WRITE", "→ socket writable"],
    "write_that_reads": ["HelloRequest", "SSL_write → WANT_READ", "SSL_write → 8 B"],
    "write_that_meets_data": ["ClientHello", "SSL_read → 4 B", "ServerHello", "SSL_write → 8 B"],
    "renegotiation": ["HelloRequest", "ClientHello", "Finished", "SSL_read → 5 B"],
    "memory": ["SSL_do_handshake → WANT_READ", "SSL_write → 5 B", "SSL_read → WANT_READ"],
    "top": ["sessions", "open", "write"],
    "silent_descriptor": ["SSL_read → 10 B", "SSL_read → 990 B", "SSL_read → WANT_READ"],
}
"""The functions of docs/traced.py, and what each picture is there to show, in the order of one thread."""


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_shows_what_the_page_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    image = getattr(importlib.import_module("traced"), name)()
    found = re.fullmatch(
        r'<div class="trace"><img alt="[^"]+" src="data:image/svg\+xml;base64,(.+)"></div>\n?', image
    )
    assert found  # as HTML: a Markdown image may not hold an SVG
    drawn = " ".join(xml.etree.ElementTree.fromstring(base64.b64decode(found[1])).itertext())
    at = [drawn.find(what) for what in PICTURES[name]]
    assert -1 not in at and at == sorted(at), drawn


def test_every_picture_is_tested() -> None:
    named = re.findall(r"traced\.(\w+)\(\)", (ROOT / "docs" / "conf.py").read_text(encoding="utf-8"))
    assert sorted(named) == sorted(PICTURES)


@pytest.mark.usefixtures("workplace")
def test_the_tutorial_can_be_typed_at_the_prompt(openssl: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As Python up to 3.12 takes it: there a block ends with an empty line, and with nothing else."""
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^openssl .*$", text, re.MULTILINE)
    subprocess.run([openssl, *shlex.split(command)[1:]], check=True, capture_output=True)
    console = code.InteractiveConsole({"__name__": "__console__"})
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in (*block.splitlines(), ""):
            more = console.push(line)
        assert not more, block
    assert "Error" not in capsys.readouterr().err


def test_what_the_pages_name_is_there() -> None:
    """Extras to install, environments of tox, programs under examples/, and the tests that show something."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = set(tomllib.load(file)["project"]["optional-dependencies"])
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    tox = (ROOT / "tox.ini").read_text(encoding="utf-8")
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        for named in re.findall(r"pip install '(?:\.|tls-bridge)\[([\w,]+)\]'", text):
            assert set(named.split(",")) <= extras, page
        for environment in re.findall(r"tox -e (\w+)", text):
            assert f"[testenv:{environment}]" in tox, page
        for example in re.findall(r"examples/\w+\.py", text):
            assert (ROOT / example).exists(), f"{page.name} names {example}"
        for test in re.findall(r"`(test_\w+)`", text):
            assert f"def {test}(" in tests, f"{page.name} names {test}"


def test_every_error_has_its_cause_and_its_cure() -> None:
    text = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", text, re.MULTILINE))
    parents = {"BridgeError", "SessionEnded", "DeadlineExceeded", "ShutDown"}
    errors = {
        name
        for name, one in vars(bridge.errors).items()
        if isinstance(one, type) and issubclass(one, Exception)
    }
    assert errors - parents == named


def test_every_link_between_the_pages_leads_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
