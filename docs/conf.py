"""Sphinx's configuration.  What can be drawn from the code is drawn from it, at build time, by `drawn`."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))

import drawn
import traced

project = "tls-bridge"
author = "the tls-bridge contributors"
project_copyright = "2026, the tls-bridge contributors"
release = version = version("tls-bridge")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "figures"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"tls-bridge {release}"

myst_enable_extensions = ["colon_fence", "deflist", "substitution"]
myst_heading_anchors = 3
myst_substitutions = {
    "ownership": drawn.ownership(),
    "states_picture": drawn.states_picture(),
    "states_table": drawn.states_table(),
    "timeouts": drawn.defaults("Timeouts"),
    "limits": drawn.defaults("Limits"),
    "commands": drawn.commands(),
    "trace_echo": traced.echo(),
    "trace_silence": traced.silence(),
    "trace_stalled_write": traced.stalled_write(),
    "trace_write_that_reads": traced.write_that_reads(),
    "trace_write_that_meets_data": traced.write_that_meets_data(),
    "trace_renegotiation": traced.renegotiation(),
    "trace_memory": traced.memory(),
    "trace_silent_descriptor": traced.silent_descriptor(),
    "top": traced.top(),
}

default_role = "code"  # `name` in a docstring is code, as it is in Markdown
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True

ALIASES = ("AnyContext", "BytesLike", "CodecFactory")  # explained on the page of the API
ALIASES += ("Certificates", "Key", "KeyLog", "OCSPCheck", "OCSPStaple", "Password")
autodoc_type_aliases = {name: name for name in ALIASES}

# References into our own names must resolve.  Others live in other projects' documentation.
nitpick_ignore_regex = [("py:.*", r"(?!bridge\b).*"), ("py:class", r"bridge\.codecs\.M")]


NOT_MADE_BY_CALLING = {
    "bridge.CloseReport",
    "bridge.Context",
    "bridge.Listener",
    "bridge.ListenerSnapshot",
    "bridge.Session",
    "bridge.SessionInfo",
    "bridge.SessionSnapshot",
    "bridge.Snapshot",
    "bridge.Stream",
    "bridge.Totals",
    "bridge.Trace",
    "bridge.TraceEvent",
    "bridge.ssl.SSLSocket",
    "bridge.ssl.SSLSession",
    "bridge.session.InboxView",
    "bridge.session.OutboxView",
}


def signature(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    arguments: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Without the arguments of what is not made by calling it, and with the plain names of type aliases."""
    if name in NOT_MADE_BY_CALLING:
        return "", None
    return arguments and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", arguments), returns


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-signature", signature)
