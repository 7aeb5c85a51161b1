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


PHA = "TLS 1.3's authentication after the handshake: the bridge does not ask clients for certificates then"
PSK = "pre-shared keys: the bridge has no callbacks for them"
CERTIFICATES = "the private `_sslobj` is asked for chains of the private `_ssl.Certificate`"

FAILS: list[Exemption] = [
    *(
        Exemption(f"test_ssl.TestPostHandshakeAuth.{name}", PHA)
        for name in (
            "test_bpo37428_pha_cert_none",
            "test_pha_no_pha_client",
            "test_pha_no_pha_server",
            "test_pha_not_tls13",
            "test_pha_optional",
            "test_pha_optional_nocert",
            "test_pha_required",
            "test_pha_required_nocert",
        )
    ),
    Exemption("test_ssl.ThreadedTests.test_psk", PSK, since=(3, 13)),
    Exemption("test_ssl.ThreadedTests.test_psk_tls1_3", PSK, since=(3, 13)),
    Exemption("test_ssl.TestPostHandshakeAuth.test_internal_chain_client", CERTIFICATES),
    Exemption(
        "test_ssl.TestSSLDebug.test_msg_callback_tls12", "the private `_msg_callback` is called by nobody"
    ),
    Exemption(
        "test_ssl.ThreadedTests.test_session",
        "`session_stats()` counts the handshakes of the stdlib's context, which makes none",
    ),
    Exemption("test_ssl.ThreadedTests.test_shared_ciphers", "pyOpenSSL cannot tell what a client offered"),
    Exemption(
        "test_ssl.SimpleBackgroundTests.test_get_ca_certs_capath",
        "`get_ca_certs()` does not list what a handshake has found in a capath",
    ),
]
"""What fails because it asks for something that is the stdlib's alone."""

NOT_RUN: list[Exemption] = [
    Exemption(
        "test_ssl.SimpleBackgroundTests.test_makefile_close",
        "expects the descriptor to be closed when close() returns: a worker closes it, a moment later",
    ),
]
"""What is not run, because it does not always end the same way."""
