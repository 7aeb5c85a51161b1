"""`certificate_dict` against the stdlib's own decoder, certificate by certificate."""

from __future__ import annotations

import datetime
import ipaddress
import re
import ssl
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import certifi
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import AuthorityInformationAccessOID, NameOID

from bridge.ssl.facts import _full_names, _general_name, certificate_dict, elements

pytestmark = pytest.mark.usefixtures("default_bridge")

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_KEY = ec.generate_private_key(ec.SECP256R1())
_BORN = datetime.datetime(2031, 3, 5, 4, 5, 6, tzinfo=datetime.timezone.utc)
_UPN = x509.ObjectIdentifier("1.3.6.1.4.1.311.20.2.3")
_SRV = x509.ObjectIdentifier("1.3.6.1.5.5.7.8.7")
_UNKNOWN = x509.ObjectIdentifier("1.2.3.4.5555555555")


def agree(pem: bytes, directory: Path) -> dict[str, Any]:
    """What we say about the certificate, once it is what the stdlib says, in the stdlib's order."""
    path = directory / "one.pem"
    path.write_bytes(pem + b"\n")
    theirs: dict[str, Any] = ssl._ssl._test_decode_cert(str(path))  # type: ignore[attr-defined]
    ours = certificate_dict(x509.load_pem_x509_certificate(pem))
    assert list(ours.items()) == list(theirs.items())
    return ours


def make(*extensions: x509.ExtensionType, subject: x509.Name | None = None, serial: int = 1) -> bytes:
    """A certificate of our own, as PEM."""
    name = subject if subject is not None else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    builder = x509.CertificateBuilder(name, name, _KEY.public_key(), serial)
    builder = builder.not_valid_before(_BORN).not_valid_after(_BORN + datetime.timedelta(365 * 30))
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(_KEY, hashes.SHA256()).public_bytes(Encoding.PEM)


def shipped_with_python() -> Iterator[bytes]:
    """The certificates in CPython's own tests, where they are installed, but for one that is broken on purpose."""
    for path in sorted(Path(sysconfig.get_path("stdlib"), "test").rglob("*.pem")):
        if path.name != "badcert.pem":
            yield from _PEM.findall(path.read_bytes())


def test_what_trustme_issues_reads_the_same(tmp_path: Path) -> None:
    ca = trustme.CA()
    leaf = ca.issue_cert(
        "localhost", "*.example.org", "127.0.0.1", "::1", "2001:db8::ff", "a@example.org", "10.0.0.0/8"
    )
    facts = agree(leaf.cert_chain_pems[0].bytes(), tmp_path)
    assert ("IP Address", "2001:DB8:0:0:0:0:0:FF") in facts["subjectAltName"]
    assert ("IP Address", "<invalid>") in facts["subjectAltName"]
    agree(ca.cert_pem.bytes(), tmp_path)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_every_root_of_certifi_reads_the_same(tmp_path: Path) -> None:
    roots = _PEM.findall(Path(certifi.where()).read_bytes())
    assert len(roots) > 50
    for root in roots:
        agree(root, tmp_path)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_the_certificates_of_cpythons_own_tests_read_the_same(tmp_path: Path) -> None:
    certificates = list(shipped_with_python())
    if not certificates:
        pytest.skip("this Python comes without its tests")
    for certificate in certificates:
        agree(certificate, tmp_path)


def test_every_kind_of_general_name_reads_the_same(tmp_path: Path) -> None:
    names: list[x509.GeneralName] = [
        x509.DNSName("a.example"),
        x509.DNSName(""),
        x509.RFC822Name("a@example.org"),
        x509.UniformResourceIdentifier("https://a.example/?b"),
        x509.IPAddress(ipaddress.ip_address("192.0.2.1")),
        x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COUNTRY_NAME, "CH")])),
        x509.RegisteredID(NameOID.COMMON_NAME),
        x509.RegisteredID(_UNKNOWN),
        x509.OtherName(_UNKNOWN, b"\x0c\x01a"),
        x509.OtherName(_UPN, b"\x0c\x03a@b"),
        x509.OtherName(_UPN, b"\x16\x03a@b"),
        x509.OtherName(_SRV, b"\x16\x04_a.b"),
    ]
    facts = agree(make(x509.SubjectAlternativeName(names)), tmp_path)
    assert len(facts["subjectAltName"]) == len(names)
    assert ("othername", "<unsupported>") in facts["subjectAltName"]


def test_where_to_ask_about_revocation_reads_the_same(tmp_path: Path) -> None:
    def uri(text: str) -> x509.UniformResourceIdentifier:
        return x509.UniformResourceIdentifier(text)

    access = x509.AuthorityInformationAccess(
        [
            x509.AccessDescription(AuthorityInformationAccessOID.OCSP, uri("http://ocsp.example/1")),
            x509.AccessDescription(AuthorityInformationAccessOID.CA_ISSUERS, uri("http://ca.example")),
            x509.AccessDescription(AuthorityInformationAccessOID.OCSP, uri("http://ocsp.example/2")),
            x509.AccessDescription(AuthorityInformationAccessOID.OCSP, x509.DNSName("not.a.uri")),
        ]
    )
    points = x509.CRLDistributionPoints(
        [
            x509.DistributionPoint([uri("http://crl.example/1"), x509.DNSName("no.uri")], None, None, None),
            x509.DistributionPoint([uri("ldap://crl.example/2")], None, None, None),
        ]
    )
    facts = agree(make(access, points), tmp_path)
    assert facts["OCSP"] == ("http://ocsp.example/1", "http://ocsp.example/2")
    assert facts["caIssuers"] == ("http://ca.example",)
    assert facts["crlDistributionPoints"] == ("http://crl.example/1", "ldap://crl.example/2")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Zürich", _ASN1Type.UTF8String),
        ("日本", _ASN1Type.BMPString),
        ("日本", _ASN1Type.UniversalString),
        ("plain", _ASN1Type.PrintableString),
        ("plain", _ASN1Type.T61String),
    ],
)
def test_every_kind_of_string_in_a_name_reads_the_same(
    text: str, encoding: _ASN1Type, tmp_path: Path
) -> None:
    name = x509.Name(
        [
            x509.RelativeDistinguishedName(
                [
                    x509.NameAttribute(NameOID.ORGANIZATION_NAME, text, encoding),
                    x509.NameAttribute(_UNKNOWN, text, encoding),
                ]
            ),
            x509.RelativeDistinguishedName(
                [x509.NameAttribute(NameOID.X500_UNIQUE_IDENTIFIER, b"\x00\x01\xff", _ASN1Type.BitString)]
            ),
        ]
    )
    facts = agree(make(subject=name), tmp_path)
    assert {value for rdn in facts["subject"] for _, value in rdn} == {text, b"\x01\xff"}


def test_latin_letters_in_a_teletex_string_are_read_although_cryptography_refuses_them(
    tmp_path: Path,
) -> None:
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Muller", _ASN1Type.T61String)])
    der = ssl.PEM_cert_to_DER_cert(make(subject=name).decode()).replace(b"Muller", b"M\xfcller")
    facts = agree(ssl.DER_cert_to_PEM_cert(der).strip().encode(), tmp_path)
    assert facts["subject"] == ((("organizationName", "Müller"),),)


@pytest.mark.parametrize("serial", [1, 0x7F, 0x80, 0xFFF, 1 << 158])
def test_serial_numbers_read_the_same(serial: int, tmp_path: Path) -> None:
    assert int(agree(make(serial=serial), tmp_path)["serialNumber"], 16) == serial


def test_dates_are_padded_with_spaces(tmp_path: Path) -> None:
    assert agree(make(), tmp_path)["notBefore"] == "Mar  5 04:05:06 2031 GMT"


def test_a_certificate_whose_extensions_are_damaged_is_a_value_error() -> None:
    damaged = x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, b"\x30\x20\x82\x01a")
    certificate = x509.load_pem_x509_certificate(make(damaged))
    with pytest.raises(ValueError, match="cut off"):
        certificate_dict(certificate)


@pytest.mark.parametrize("der", [b"\x30", b"\x30\x05a", b"\x30\x82\x01", b"\x04\x00\x30\x01"])
def test_der_that_is_cut_off_is_never_read_as_if_it_were_whole(der: bytes) -> None:
    with pytest.raises(ValueError, match="cut off"):
        list(elements(der))


def test_a_name_of_an_unknown_kind_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="unknown kind: 0x99"):
        _general_name(0x99, b"")


def test_a_distribution_point_need_not_have_a_name() -> None:
    """RFC 5280, 4.2.1.13: here it is the reasons alone."""
    assert list(_full_names(bytes.fromhex("300481020560"))) == []
