"""The code in README and docs runs, word for word: each page from top to bottom, in one namespace."""

from __future__ import annotations

import code
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trustme

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "```python\n" in page.read_text(encoding="utf-8")
]
FILES = {"cert": "localhost", "new-cert": "localhost", "client": "alice@example.org"}


@pytest.fixture
def workplace(ca: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current directory with the PEM files that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    ca.cert_pem.write_to_path("ca.pem")
    for name, identity in FILES.items():
        issued = ca.issue_cert(identity)
        issued.cert_chain_pems[0].write_to_path(f"{name}.pem")
        issued.private_key_pem.write_to_path(
            f"{name.replace('cert', 'key') if 'cert' in name else f'{name}-key'}.pem"
        )


@pytest.mark.usefixtures("default_bridge", "workplace")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_on_this_page_runs(page: Path, request: pytest.FixtureRequest) -> None:
    text = page.read_text(encoding="utf-8")
    for command in re.findall(r"^openssl .*$", text, re.MULTILINE):
        program = request.getfixturevalue("openssl")
        subprocess.run([program, *shlex.split(command)[1:]], check=True, capture_output=True)
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        above = "\n" * text.count("\n", 0, block.start(1))  # so that a traceback shows the page's own line
        exec(compile(above + block[1], str(page), "exec"), namespace)


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


def test_every_link_between_the_pages_leads_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
