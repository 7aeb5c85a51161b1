"""Which of CPython's own tests fail over our classes, and why that is as it should be.

The list is checked both ways: a failure that is not on it fails `test_cpython.py`, and so does an entry that no
failing test needs, on any Python it is for.  A hang or a crash is never expected.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import sys


@dataclasses.dataclass(frozen=True)
class Exemption:
    """Tests, by a pattern of fnmatch for their names, on the Pythons from *since* up to and without *before*."""

    pattern: str
    reason: str
    since: tuple[int, ...] = (3, 10)
    before: tuple[int, ...] = (4, 0)

    @property
    def applies(self) -> bool:
        """Whether it is for the Python that runs this."""
        return self.since <= sys.version_info[:3] < self.before

    def covers(self, name: str) -> bool:
        """Whether *name* is that of one of its tests."""
        return fnmatch.fnmatchcase(name, self.pattern)


FAILS: list[Exemption] = []
"""What fails because it asks for something that is the stdlib's alone."""

NOT_RUN: list[Exemption] = []
"""What is not run, because it does not always end the same way."""
