"""Certificates in the words of the stdlib: what `ssl.SSLSocket.getpeercert()` returns.

Names and extensions are read from the DER itself (X.690).  `cryptography` shows none of them if it dislikes one,
as a company's umlaut in an old encoding; OpenSSL is lenient there, and with it the stdlib.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, TypeAlias

from cryptography import x509

__all__ = ["certificate_dict", "elements"]

Name: TypeAlias = "tuple[tuple[tuple[str, str | bytes], ...], ...]"

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

# Tags (X.680, 8.4), and those that RFC 5280 gives to parts of a certificate and kinds of a GeneralName (4.2.1.6).
_BIT_STRING, _UTF8, _IA5, _UNIVERSAL, _BMP = 0x03, 0x0C, 0x16, 0x1C, 0x1E
_ENCODINGS = {_UTF8: "utf-8", _UNIVERSAL: "utf-32-be", _BMP: "utf-16-be"}
_VERSION, _EXTENSIONS, _POINT, _FULL_NAME = 0xA0, 0xA3, 0xA0, 0xA0
_OTHER, _DIRECTORY, _URI, _ADDRESS, _REGISTERED = 0xA0, 0xA4, 0x86, 0x87, 0x88
_TEXTS = {0x81: "email", 0x82: "DNS", _URI: "URI"}
_UNSUPPORTED = {_OTHER: "othername", 0xA3: "X400Name", 0xA5: "EdiPartyName"}
_OTHER_NAMES = {
    "1.3.6.1.4.1.311.20.2.3": ("UPN", _UTF8),
    "1.3.6.1.5.5.7.8.5": ("XmppAddr", _UTF8),
    "1.3.6.1.5.5.7.8.7": ("SRVName", _IA5),
    "1.3.6.1.5.5.7.8.8": ("NAIRealm", _UTF8),
    "1.3.6.1.5.5.7.8.9": ("SmtpUTF8Mailbox", _UTF8),
}
"""Those that OpenSSL prints, since its version 3."""


def certificate_dict(certificate: x509.Certificate) -> dict[str, Any]:
    """What the stdlib's `getpeercert()` says about *certificate*, its order included.  Any thread.

    ValueError if names or extensions are malformed.
    """
    fields = [field for field in elements(_inside(certificate.tbs_certificate_bytes)) if field[0] != _VERSION]
    extensions = {
        oid: value for tag, value in fields if tag == _EXTENSIONS for oid, value in _extensions(value)
    }
    facts: dict[str, Any] = {
        "subject": _name(fields[4][1]),
        "issuer": _name(fields[2][1]),
        "version": certificate.version.value + 1,
        "serialNumber": _hexadecimal(certificate.serial_number),
        "notBefore": _date(certificate.not_valid_before_utc),
        "notAfter": _date(certificate.not_valid_after_utc),
    }
    if "2.5.29.17" in extensions:
        facts["subjectAltName"] = tuple(_general_name(*name) for name in elements(extensions["2.5.29.17"]))
    access = [tuple(elements(item)) for _, item in elements(extensions.get("1.3.6.1.5.5.7.1.1", b""))]
    for key, method in (("OCSP", "1.3.6.1.5.5.7.48.1"), ("caIssuers", "1.3.6.1.5.5.7.48.2")):
        facts[key] = _uris(place for (_, oid), place in access if _dotted(oid) == method)
    facts["crlDistributionPoints"] = _uris(_full_names(extensions.get("2.5.29.31", b"")))
    return {key: fact for key, fact in facts.items() if fact is not None}


def elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each element of *der* (X.690, 8.1); ValueError if it is cut off."""
    while der:
        tag, length, start = der[0], int.from_bytes(der[1:2], "big"), 2
        if length >= 0x80:
            start += length & 0x7F
            length = int.from_bytes(der[2:start], "big")
        content, end = der[start : start + length], start + length
        if len(der) < end:
            raise ValueError("the DER of a certificate is cut off")
        yield tag, content
        der = der[end:]


def _inside(der: bytes) -> bytes:
    """The content of the one element that *der* is."""
    [(_, content)] = elements(der)
    return content


def _extensions(der: bytes) -> Iterator[tuple[str, bytes]]:
    """Of each extension its name, and what is in the sequence that it is."""
    for _, extension in elements(_inside(der)):
        (_, oid), *_, (_, value) = elements(extension)
        yield _dotted(oid), _inside(value)


def _full_names(points: bytes) -> Iterator[tuple[int, bytes]]:
    """The GeneralNames of DistributionPoints (RFC 5280, 4.2.1.13)."""
    for _, point in elements(points):
        for tag, place in elements(point):
            if tag == _POINT:
                for kind, names in elements(place):
                    yield from elements(names) if kind == _FULL_NAME else ()


def _uris(names: Iterable[tuple[int, bytes]]) -> tuple[str, ...] | None:
    return tuple(content.decode() for tag, content in names if tag == _URI) or None


def _general_name(tag: int, content: bytes) -> tuple[str, str | Name]:
    if tag in _TEXTS:
        return _TEXTS[tag], content.decode()
    if tag == _DIRECTORY:
        return "DirName", _name(_inside(content))
    if tag == _ADDRESS:
        return "IP Address", _address(content)
    if tag == _REGISTERED:
        return "Registered ID", _long_name(_dotted(content))
    if tag not in _UNSUPPORTED:
        raise ValueError(f"a certificate's GeneralName is of an unknown kind: {tag:#x}")
    return _UNSUPPORTED[tag], _other_name(content) if tag == _OTHER else "<unsupported>"


def _other_name(der: bytes) -> str:
    (_, oid), (_, explicit) = elements(der)
    label, expected = _OTHER_NAMES.get(_dotted(oid), ("", 0))
    [(tag, text)] = elements(explicit)
    known = tag == expected and ssl.OPENSSL_VERSION_INFO >= (3,)
    return f"{label}:{text.decode()}" if known else "<unsupported>"


def _address(packed: bytes) -> str:
    if len(packed) == 4:
        return ".".join(map(str, packed))
    if len(packed) == 16:
        return ":".join(f"{int.from_bytes(packed[i : i + 2], 'big'):X}" for i in range(0, 16, 2))
    return "<invalid>"


def _name(rdns: bytes) -> Name:
    return tuple(tuple(_attribute(der) for _, der in elements(rdn)) for _, rdn in elements(rdns))


def _attribute(der: bytes) -> tuple[str, str | bytes]:
    (_, oid), (tag, value) = elements(der)
    known_as = _long_name(_dotted(oid))
    return known_as, value[1:] if tag == _BIT_STRING else value.decode(_ENCODINGS.get(tag, "latin-1"))


def _dotted(oid: bytes) -> str:
    arcs, arc = [], 0
    for byte in oid:
        arc = arc << 7 | byte & 0x7F
        if byte < 0x80:
            arcs.append(arc)
            arc = 0
    both, *others = arcs
    first = min(both // 40, 2)
    return ".".join(map(str, (first, both - 40 * first, *others)))


@functools.lru_cache(maxsize=256)
def _long_name(oid: str) -> str:
    """What the stdlib's OpenSSL calls *oid*."""
    try:
        return ssl._ASN1Object(oid).longname
    except ValueError:
        return oid


def _hexadecimal(number: int) -> str:
    digits = f"{abs(number):X}"
    return "-" * (number < 0) + "0" * (len(digits) % 2) + digits


def _date(moment: datetime) -> str:
    """As ASN1_TIME_print(3): in English whatever the locale."""
    return f"{_MONTHS[moment.month - 1]} {moment.day:2} {moment:%H:%M:%S} {moment.year} GMT"
