"""The stdlib's `ssl`, with the bridge's TLS: ``from bridge import ssl`` in place of ``import ssl``.

All names are the stdlib's, and most are its own objects.  Different are `SSLContext`, a subclass of the stdlib's;
`SSLSocket` likewise; and the functions that make contexts, which make ours.  Besides: `inject` and `extract` put the
bridge in the stdlib's place for libraries that build their own contexts, and `default_bridge` is the Bridge that
all sockets of this process share.
"""

from __future__ import annotations

import ssl as _stdlib
import types as _types
from typing import Any

from bridge.ssl.contexts import SSLContext
from bridge.ssl.injection import extract as extract
from bridge.ssl.injection import inject as inject
from bridge.ssl.process import default_bridge as default_bridge
from bridge.ssl.sessions import SSLSession
from bridge.ssl.sockets import SSLSocket

_namespace: dict[str, Any] = {
    **vars(_stdlib),
    "SSLContext": SSLContext,
    "SSLSession": SSLSession,
    "SSLSocket": SSLSocket,
}


def _rebound(name: str) -> Any:
    """The stdlib's function *name* as it would be if it stood here: it looks names up among ours."""
    theirs = getattr(_stdlib, name)
    ours = _types.FunctionType(theirs.__code__, _namespace, name, theirs.__defaults__, theirs.__closure__)
    ours.__kwdefaults__, ours.__doc__ = theirs.__kwdefaults__, theirs.__doc__
    return ours


for _name in (
    "create_default_context",
    "_create_unverified_context",
    "_create_default_https_context",
    "_create_stdlib_context",
    "get_server_certificate",
    "wrap_socket",
):
    if hasattr(_stdlib, _name):  # the last is gone since Python 3.12
        globals()[_name] = _namespace[_name] = _rebound(_name)


def __getattr__(name: str) -> Any:
    return getattr(_stdlib, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_stdlib)})


__all__ = [name for name in __dir__() if not name.startswith("_")]
