"""The code in README and docs runs, word for word: each page from top to bottom, in one namespace."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trustme

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


def test_every_link_between_the_pages_leads_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
