"""Certificates, keys and trust: everything a `bridge.context` loads, and what a person reads when it cannot.

Three kinds of source are taken alike, and told apart by what they are:

* a path (`str` or `os.PathLike`) to a PEM file, or to a directory for trusted CAs;
* PEM itself (`str` or `bytes`), recognised by its ``-----BEGIN``;
* objects of `cryptography`.

Files are read and parsed here rather than by OpenSSL, for two reasons: its errors name neither the file nor
the remedy, and it asks for the password of an encrypted key *on the terminal*.  Every failure is a
`ConfigurationError`.  Any thread may do it.
"""

from __future__ import annotations

import contextlib
import os
import re
import ssl
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from typing import Any, cast, get_args

import OpenSSL
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from OpenSSL import SSL, crypto

from bridge.errors import ConfigurationError

Certificates = str | bytes | os.PathLike[str] | x509.Certificate | Sequence[x509.Certificate]
"""A path to PEM, PEM, or `cryptography` certificates."""

PrivateKey = RSAPrivateKey | EllipticCurvePrivateKey | Ed25519PrivateKey | Ed448PrivateKey

Key = str | bytes | os.PathLike[str] | PrivateKey
"""A path to PEM, PEM, or a private key of `cryptography`."""

Password = str | bytes | Callable[[], str | bytes]

_BEGIN_CERTIFICATE = re.compile(rb"-----BEGIN (X509 |TRUSTED )?CERTIFICATE-----")
_TRUSTED = b"-----BEGIN TRUSTED CERTIFICATE-----"
_EDGE = re.compile(rb"(?<![^-\r\n])[ \t]*-----(BEGIN |END [^\r\n]+?-----)")
"""Where a block begins or ends: on a line of its own, or where somebody has joined two files without one."""
_PRIVATE_KEY = re.compile(rb"-----BEGIN (([A-Z0-9]+ )*PRIVATE KEY)-----.*?-----END \1-----", re.DOTALL)
_COMMENT = re.compile(rb"^[ \t]*#.*\n?", re.MULTILINE)
_HASHED_NAME = re.compile(r"[0-9a-f]{8}\.\d+")
_DEFAULT_DIRECTORIES = os.pathsep.join({ssl.get_default_verify_paths().openssl_capath, "/etc/ssl/certs"})
_lib: Any = getattr(getattr(OpenSSL, "_util", None), "lib", None)


# Who we are.


def load_identity(
    raw: SSL.Context, certfile: Certificates, keyfile: Key | None, password: Password | None
) -> None:
    """Give *raw* a certificate chain, leaf first, and its private key: *certfile*'s own if *keyfile* is None.

    ConfigurationError if a file is unreadable or not PEM, the password is missing or wrong, the key is not
    the certificate's, or the certificate is not valid today.
    """
    chain = certificates(certfile, "certfile")
    if keyfile is None and not isinstance(certfile, (str, bytes, os.PathLike)):
        raise ConfigurationError(
            "keyfile is needed: certfile is a certificate object, which holds no private key"
        )
    key = _private_key(
        certfile if keyfile is None else keyfile, password, "certfile" if keyfile is None else "keyfile"
    )
    _check_dates(chain[0], _called(certfile, "certfile"))
    _check_match(chain, key, _called(certfile, "certfile"))
    try:
        raw.use_certificate(chain[0])
        for certificate in chain[1:]:
            raw.add_extra_chain_cert(certificate)
        raw.use_privatekey(key)
        raw.check_privatekey()
    except (SSL.Error, crypto.Error, TypeError, ValueError) as error:
        name = _called(certfile, "certfile")
        raise ConfigurationError(
            f"OpenSSL refuses the certificate or key in {name}: {reasons(error)}"
        ) from error


def certificates(source: Certificates, what: str) -> list[x509.Certificate]:
    """All certificates in *source*, in order; at least one.  *what* names the argument in error messages."""
    if isinstance(source, (str, bytes, os.PathLike)):
        return _parse(_pem(source, what), _called(source, what))
    found = list(source) if isinstance(source, Iterable) else [source]
    if not found:
        raise ConfigurationError(f"{what} is an empty list: it needs at least one certificate")
    for item in found:
        if not isinstance(item, x509.Certificate):
            raise ConfigurationError(
                f"{what} must be a path, PEM, or cryptography certificates, not {type(item).__name__}"
            )
    return found


def _parse(pem: bytes, name: str) -> list[x509.Certificate]:
    if not _BEGIN_CERTIFICATE.search(pem):
        raise ConfigurationError(f"{name} holds no certificate (no '-----BEGIN CERTIFICATE-----' line)")
    if _TRUSTED in pem:
        raise ConfigurationError(
            f"{name} holds a TRUSTED CERTIFICATE, a form of OpenSSL's own, which is only read from a file whose path"
            " is given as cafile; `openssl x509 -in FILE` prints it as an ordinary one"
        )
    if _EDGE.findall(pem)[-1:] == [b"BEGIN "]:  # cryptography would pass over the rest of a chain
        raise ConfigurationError(f"{name} is cut off: what its last '-----BEGIN' line begins does not end")
    try:
        return x509.load_pem_x509_certificates(pem)
    except (ValueError, x509.InvalidVersion) as error:
        raise ConfigurationError(f"{name} holds a damaged certificate: {error}") from error


def _private_key(source: Key | Certificates, password: Password | None, what: str) -> PrivateKey:
    if isinstance(source, get_args(PrivateKey)):
        return cast(PrivateKey, source)
    if not isinstance(source, (str, bytes, os.PathLike)):
        raise ConfigurationError(
            f"{what} must be a path, PEM, or a cryptography private key, not {type(source).__name__}"
        )
    name = _called(source, what)
    block = _PRIVATE_KEY.search(_pem(source, what))
    if block is None:
        hint = "; pass the key's file as keyfile" if what == "certfile" else ""
        raise ConfigurationError(
            f"{name} holds no private key (no '-----BEGIN PRIVATE KEY-----' block){hint}"
        )
    key = _load_key(block.group(), password, name)
    if not isinstance(key, get_args(PrivateKey)):
        raise ConfigurationError(
            f"the private key in {name} is of a kind TLS cannot use: {type(key).__name__}"
        )
    return cast(PrivateKey, key)


def _load_key(block: bytes, password: Password | None, name: str) -> Any:
    """The key in one PEM *block*.  The password is used only if the key is encrypted, and never asked for."""
    try:
        return load_pem_private_key(block, None)
    except TypeError:
        pass  # it is encrypted
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigurationError(
            f"the private key in {name} is damaged or of an unknown kind: {error}"
        ) from error
    if password is None:
        raise ConfigurationError(f"the private key in {name} is encrypted: pass its password")
    secret = _password(password, name)
    try:
        return load_pem_private_key(block, secret)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigurationError(
            f"the password for the private key in {name} is wrong, or the key damaged, or encrypted in an unknown way"
        ) from error


def _password(password: Password, name: str) -> bytes:
    if callable(password):
        try:
            password = password()
        except Exception as error:
            raise ConfigurationError(
                f"the password callable for {name} raised {type(error).__name__}: {error}"
            ) from error
    if isinstance(password, str):
        password = password.encode(errors="surrogatepass")
    if not isinstance(password, bytes):
        raise ConfigurationError(
            f"the password for {name} must be str or bytes, not {type(password).__name__}"
        )
    if not password:
        raise ConfigurationError(f"the private key in {name} is encrypted, and the password given is empty")
    return password


def _check_dates(leaf: x509.Certificate, name: str) -> None:
    begin, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    now = datetime.now(timezone.utc)
    if now > end:
        raise ConfigurationError(
            f"the certificate in {name} has expired: it was valid from {begin} until {end}"
        )
    if now < begin:
        raise ConfigurationError(
            f"the certificate in {name} is not yet valid: it will be from {begin} until {end}; now is {now}"
        )


def _check_match(chain: list[x509.Certificate], key: PrivateKey, name: str) -> None:
    def public(holder: Any) -> bytes:
        encoded: bytes = holder.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return encoded

    try:
        ours = public(key)
        places = [place for place, certificate in enumerate(chain, 1) if public(certificate) == ours]
    except (ValueError, UnsupportedAlgorithm):
        return  # a kind of key that cryptography does not know: OpenSSL compares them itself
    if not places:
        subject = chain[0].subject.rfc4514_string()
        raise ConfigurationError(
            f"the private key does not match the certificate in {name} (subject {subject!r})"
        )
    if places[0] != 1:
        raise ConfigurationError(
            f"the private key does not match the first certificate in {name} but number {places[0]}: "
            "the certificate of the key comes first, then the chain"
        )


# Whom we trust.


def load_trust(raw: SSL.Context, cafile: Certificates | None, what: str = "cafile") -> None:
    """Let *raw* trust the CAs in *cafile*, which may also be a directory of hashed names (openssl-rehash(1)).

    None stands for the system's CAs.  ConfigurationError names what cannot be read, or holds no certificate.
    """
    if cafile is None:
        _load_system_trust(raw)
    elif isinstance(cafile, (str, os.PathLike)) and not _is_pem(cafile):
        directory = os.path.isdir(cafile)
        if directory:
            _hashed_files(cafile, what)
        elif not _BEGIN_CERTIFICATE.search(_pem(cafile, what)):
            _parse(b"", _called(cafile, what))
        place = os.fsencode(cafile)  # pyOpenSSL itself takes every name for UTF-8
        try:
            raw.load_verify_locations(*((None, place) if directory else (place,)))
        except SSL.Error as error:
            raise ConfigurationError(
                f"OpenSSL cannot read {_called(cafile, what)}: {reasons(error)}"
            ) from error
    else:
        store = raw.get_cert_store()
        assert store is not None
        for certificate in certificates(cafile, what):
            try:
                store.add_cert(crypto.X509.from_cryptography(certificate))
            except crypto.Error as error:  # OpenSSL looks closer than cryptography does
                raise ConfigurationError(
                    f"OpenSSL refuses a certificate in {_called(cafile, what)}: {reasons(error)}"
                ) from error


def announce(raw: SSL.Context, client_ca: Certificates, what: str = "client_ca") -> None:
    """Tell clients the names of the CAs in *client_ca*, to choose a certificate by (RFC 8446, 4.2.4)."""
    if isinstance(client_ca, (str, os.PathLike)) and not _is_pem(client_ca) and os.path.isdir(client_ca):
        files = _hashed_files(client_ca, what)
        found = [certificate for file in files for certificate in certificates(file, what)]
    else:
        found = certificates(client_ca, what)
    for certificate in {certificate.subject: certificate for certificate in found}.values():
        raw.add_client_ca(certificate)


def _load_system_trust(raw: SSL.Context) -> None:
    raw.set_default_verify_paths()
    variables = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if name in os.environ]
    if _trusts_anybody(raw):
        return
    if variables:
        given = ", ".join(f"{name}={os.environ[name]!r}" for name in variables)
        raise ConfigurationError(f"no CA certificate where the environment says they are ({given})")
    try:
        import certifi
    except ImportError as error:
        raise ConfigurationError(
            "the system has no CA certificates: pass cafile, or install certifi"
        ) from error
    raw.load_verify_locations(os.fsencode(certifi.where()))


def _trusts_anybody(raw: SSL.Context) -> bool:
    """Whether files gave the store a CA, or one of the directories, which OpenSSL reads on demand, could."""
    store = getattr(raw.get_cert_store(), "_store", None)
    if (
        store is None
        or not hasattr(_lib, "X509_STORE_get0_objects")
        or not hasattr(_lib, "sk_X509_OBJECT_num")
    ):
        return True
    if _lib.sk_X509_OBJECT_num(_lib.X509_STORE_get0_objects(store)) > 0:
        return True
    for directory in os.environ.get("SSL_CERT_DIR", _DEFAULT_DIRECTORIES).split(os.pathsep):
        with contextlib.suppress(OSError):  # OpenSSL cannot read it either
            if _hashed_names(directory):
                return True
    return False


def _hashed_names(directory: str | os.PathLike[str]) -> list[str]:
    return sorted(name for name in os.listdir(directory) if _HASHED_NAME.fullmatch(name))


def _hashed_files(directory: str | os.PathLike[str], what: str) -> list[str]:
    try:
        names = _hashed_names(directory)
    except OSError as error:
        raise ConfigurationError(f"cannot read {_called(directory, what)}: {error.strerror}") from error
    if not names:
        raise ConfigurationError(
            f"{_called(directory, what)} is a directory without certificates under hashed names "
            "(as 5ed36f99.0): run `openssl rehash` on it, or pass a PEM file"
        )
    return [os.path.join(directory, name) for name in names]


# Sources.


def _is_pem(source: object) -> bool:
    if isinstance(source, str):
        return "-----BEGIN" in source
    return isinstance(source, bytes) and b"-----BEGIN" in source


def _called(source: object, what: str) -> str:
    """How messages call *source*: by its path where it has one, and never by its contents."""
    if isinstance(source, (str, os.PathLike)) and not _is_pem(source):
        return f"{what} {os.fspath(source)!r}"
    return f"the PEM given as {what}" if isinstance(source, (str, bytes)) else f"the objects given as {what}"


def uncommented(pem: bytes) -> bytes:
    """*pem* without its lines that begin with a ``#``: what somebody has put out of use in it.  OpenSSL skips them."""
    return _COMMENT.sub(b"", pem)


def _pem(source: str | bytes | os.PathLike[str], what: str) -> bytes:
    if isinstance(source, bytes):
        return uncommented(source)
    if isinstance(source, str) and _is_pem(source):
        return uncommented(source.encode(errors="replace"))
    try:
        with open(source, "rb") as file:
            return uncommented(file.read())
    except OSError as error:
        raise ConfigurationError(f"cannot read {_called(source, what)}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{_called(source, what)} is not a path: {error}") from error


def reasons(error: Exception) -> str:
    """OpenSSL's reasons in a pyOpenSSL *error*, for a person."""
    entries = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return ", ".join(entry[-1] for entry in entries) or str(error) or "no reason given"
