"""The names of peers: what a client may ask for, and whether a certificate is for it.

OpenSSL, as pyOpenSSL offers it, checks the chain of a certificate but not the name.  `service_identity`
checks the name, by RFC 9525: subjectAltName only, at most one ``*`` as the left-most label.  Here names are
brought into the one form in which DNS, SNI and certificates write them, and mismatches into words.

A certificate's names are judged one by one: what is no name, as ``*`` or an IP address where a DNS name should
be, is nobody's, and takes nothing from the names beside it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import idna
from cryptography import x509
from OpenSSL import SSL
from service_identity import CertificateError as UnusableName
from service_identity.hazmat import DNS_ID, DNSPattern

from bridge.errors import CertificateError, ConfigurationError, HostnameMismatch

_LABEL = re.compile(r"[a-z0-9_-]{1,63}")
HOST_MISMATCH, ADDRESS_MISMATCH = 62, 64
"""X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH (X509_STORE_CTX_get_error(3))."""
_SHOWN = 8  # of a certificate's names in a message: some hold hundreds


@dataclass(frozen=True)
class PeerName:
    """The name a client means to talk to: a DNS name or an IP address.  Immutable, for any thread."""

    given: str
    ascii: str
    """Lower case, A-labels, no trailing dot: as in SNI and in certificates."""
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None

    @classmethod
    def parse(cls, name: str) -> PeerName:
        """ConfigurationError unless *name* is a DNS name (U-labels are, RFC 5890) or a bare IP address."""
        if not isinstance(name, str):
            raise ConfigurationError(f"server_hostname must be a str, not {type(name).__name__}")
        if name.startswith("[") and name.endswith("]"):
            raise ConfigurationError(
                f"server_hostname {name!r}: an IPv6 address is written without brackets here"
            )
        try:
            address = ipaddress.ip_address(name.partition("%")[0])
        except ValueError:
            return cls(name, dns_name(name, "server_hostname"), None)
        return cls(name, str(address), address)

    def check(self, certificate: x509.Certificate) -> None:
        """HostnameMismatch unless *certificate* is for this name (RFC 9525, by `service_identity`)."""
        try:
            names = alternative_names(certificate)
        except ValueError as error:
            raise refusal(f"the server's certificate holds damaged names: {error}") from error
        if not self._is_among(names):
            raise self._mismatch([str(name.value) for name in names])

    def _is_among(self, names: Sequence[x509.DNSName | x509.IPAddress]) -> bool:
        if self.address is not None:
            return any(isinstance(name, x509.IPAddress) and name.value == self.address for name in names)
        return any(isinstance(name, x509.DNSName) and self.fits(name.value) for name in names)

    def fits(self, pattern: str) -> bool:
        """Whether this is the DNS name that *pattern* of a certificate stands for.  One that is odd stands for none.

        A ``*`` is a whole label, and stands for an A-label as for any other (RFC 9525, 6.3); `service_identity`
        still says what RFC 6125 said of those it is a part of.
        """
        name = self.ascii
        if pattern.startswith("*.") and name.startswith("xn--"):
            name = "a." + name.partition(".")[2]
        try:
            return DNS_ID(name).verify(DNSPattern.from_bytes(pattern.encode()))
        except (UnusableName, ValueError):  # the latter for a wildcard and a name without dots, until 24.1
            return False

    def _mismatch(self, presented: list[str]) -> CertificateError:
        wanted = repr(self.given) if self.given == self.ascii else f"{self.given!r} ({self.ascii})"
        found = "for " + ", ".join(map(repr, presented[:_SHOWN]))
        if len(presented) > _SHOWN:
            found += f" and {len(presented) - _SHOWN} more"
        if not presented:
            found = "without any host name (it has no subjectAltName, and its common name does not count)"
        if self.address is not None and self.ascii in presented:
            wanted += " (which it holds as a DNS name, and not as an IP address)"
        if self.address is None:
            code, text = HOST_MISMATCH, "hostname mismatch"
        else:
            code, text = ADDRESS_MISMATCH, "IP address mismatch"
        return refusal(
            f"the server's certificate is {found}, not for {wanted}", code, text, cls=HostnameMismatch
        )


def dns_name(name: str, what: str) -> str:
    """*name* as DNS and certificates write it: lower case, A-labels (RFC 5891), no trailing dot.  Any thread.

    ConfigurationError, which calls it *what*, if it is no name or some unusual spelling of an IP address.
    """
    try:
        ascii_name = name.lower() if name.isascii() else idna.encode(name, uts46=True).decode("ascii")
    except idna.IDNAError as error:
        raise ConfigurationError(f"{what} {name!r} is not a valid internationalised name: {error}") from error
    ascii_name = ascii_name.removesuffix(".")
    labels = ascii_name.split(".")
    if len(ascii_name) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
        raise ConfigurationError(f"{what} {name!r} is neither a DNS name nor an IP address")
    return ascii_name


def alternative_names(certificate: x509.Certificate) -> list[x509.DNSName | x509.IPAddress]:
    """The DNS names of *certificate*'s subjectAltName, then its IP addresses.  Any thread.

    ValueError if its extensions are malformed, or one is there twice, or holds a name that cannot be read.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    except (x509.UnsupportedGeneralNameType, x509.DuplicateExtension) as error:
        raise ValueError(str(error)) from error
    kinds = (x509.DNSName, x509.IPAddress)
    return [name for kind in kinds for name in names if isinstance(name, kind)]


def peer_certificate(connection: SSL.Connection) -> x509.Certificate | None:
    """The certificate *connection*'s peer showed; CertificateError if malformed.  Its owner's thread."""
    try:
        return connection.get_peer_certificate(as_cryptography=True)
    except (ValueError, x509.InvalidVersion) as error:
        raise refusal(f"the peer's certificate is malformed: {error}") from error


def presented_chain(connection: SSL.Connection, own: x509.Certificate | None) -> tuple[x509.Certificate, ...]:
    """What *connection*'s peer sent, its *own* certificate first.  Its owner's thread.

    SSL_get_peer_cert_chain(3) leaves that one out on the server's side.
    """
    chain = _readable(connection.get_peer_cert_chain)
    return chain if own is None or own in chain[:1] else (own, *chain)


def verified_chain(connection: SSL.Connection) -> tuple[x509.Certificate, ...]:
    """What OpenSSL has verified *connection*'s peer by, the root last.  Its owner's thread."""
    return _readable(connection.get_verified_chain)


def _readable(chain: Callable[..., Any]) -> tuple[x509.Certificate, ...]:
    """Those of a *chain* of pyOpenSSL's that `cryptography` can read.  OpenSSL reads more, and has judged them all."""
    try:
        return tuple(chain(as_cryptography=True) or ())
    except (ValueError, x509.InvalidVersion):
        found = []
        for certificate in chain():
            with contextlib.suppress(ValueError, x509.InvalidVersion):
                found.append(certificate.to_cryptography())
        return (*found,)


def refusal(
    message: str,
    code: int = 1,
    text: str = "",
    depth: int | None = None,
    cls: type[CertificateError] = CertificateError,
) -> CertificateError:
    """A certificate error with the attributes of the stdlib's, and *depth* (0 is the leaf, None the whole, or unknown).

    *code* and *text* are of X509_verify_cert_error_string(3); 1 is X509_V_ERR_UNSPECIFIED.  Any thread.
    """
    error = cls(ssl.SSL_ERROR_SSL, f"[SSL: CERTIFICATE_VERIFY_FAILED] {message}")
    error.reason = "CERTIFICATE_VERIFY_FAILED"
    error.verify_code, error.verify_message = code, text or message
    error.depth = depth
    return error
