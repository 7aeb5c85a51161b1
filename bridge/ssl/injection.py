"""Putting the bridge in the stdlib's place, for programs and libraries that build their own contexts; and back.

What is replaced is the name `SSLContext`: in the module `ssl`, and wherever else it was imported to by then.  What
exists already stays what it is: contexts made before keep the stdlib's TLS.  `ssl.SSLSocket` needs no replacing,
ours is a subclass.
"""

from __future__ import annotations

import ssl
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from bridge.ssl.contexts import SSLContext, stdlib_properties

_lock = threading.Lock()
_original: Any = ssl.SSLContext
_places: list[tuple[Any, str, Any]] = []
"""Where something was replaced: the object, the attribute, and what it was."""


def inject() -> None:
    """From now on whoever makes an `ssl.SSLContext` gets the bridge's.  Any thread; idempotent."""
    with _lock:
        if _places:
            return
        # The stdlib's own setters call themselves by the global name, which is about to mean another class.
        for name, mended in stdlib_properties().items():
            _replace(_original, name, mended)
        for module in _modules():
            for name, value in list(vars(module).items()):
                if value is _original:
                    _replace(module, name, SSLContext)


def extract() -> None:
    """Undo `inject`.  What was made meanwhile stays the bridge's.  Any thread; idempotent."""
    with _lock:
        while _places:
            setattr(*_places.pop())


def _replace(place: Any, name: str, value: Any) -> None:
    _places.append((place, name, vars(place)[name]))
    setattr(place, name, value)


def _modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and name.partition(".")[0] != "bridge":
            yield module
