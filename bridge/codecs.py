"""Codecs: how a session's bytes become messages, and messages bytes.

==================  ========  ===========================================================
codec               messages  on the wire
==================  ========  ===========================================================
`Raw`               bytes     the bytes themselves: a message is whatever arrived together
`Lines`             str       text, each line ended by a newline
`LengthPrefixed`    bytes     the length in 1, 2, 3, 4 or 8 bytes, then the message
`Delimited`         bytes     the message, then a delimiter; start bytes before it if wanted
==================  ========  ===========================================================

Wherever the bridge takes ``codec=`` it takes a *factory*, called once a session: a class
(``codec=bridge.codecs.Lines``) or ``codec=lambda: bridge.codecs.LengthPrefixed(2)``.  Any class with the
three methods of `Codec` will do.

All but `Raw` bound the size of one message, so that a peer cannot fill the memory with one that never ends.
They raise `bridge.MessageTooLarge` as soon as what they hold proves the message too large, so at no time
do they hold more than the limit, the framing, and one chunk.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from bridge.errors import CodecError, ConfigurationError, MessageTooLarge, fresh

__all__ = ("Codec", "Delimited", "LengthPrefixed", "Lines", "Raw")

M = TypeVar("M")

MAX_LENGTH = 1024 * 1024
"""The default limit of one message in bytes: far above the lines and records of text and RPC protocols, and
low enough that a thousand hostile sessions, each a byte short of a whole message, hold no more than 1 GiB."""

BytesLike = bytes | bytearray | memoryview
"""What the codecs of bytes send; at run time, any object with the buffer protocol."""


@runtime_checkable
class Codec(Protocol[M]):
    """Decodes and encodes the messages, of type *M*, of one session.

    Threads: `decode` and `eof` are called by the coordinator, or by a worker or a receiver in its place, and never
    by two at a time, so they need no lock; what sessions share needs one.  `encode` is called by any application
    thread, by several at once, and while `decode` runs, whose state it must not touch.  None of them may wait.

    An exception out of `decode` or `eof` ends this session, and only this one, with a `bridge.CodecError`.

    An attribute ``buffered``, if there is one: how many bytes of an incomplete message it holds.  They count for
    `bridge.Limits.total_bytes`.
    """

    __slots__ = ()

    @abc.abstractmethod
    def decode(self, data: bytes) -> Iterable[M]:
        """The messages that *data*, the next bytes of the stream, completes.  One thread at a time.

        What is left over is kept for the next call.  The caller iterates to the end, so this may be a
        generator: what it yields before it raises is delivered, and then the session ends.
        """

    @abc.abstractmethod
    def encode(self, message: M) -> bytes:
        """*message* as bytes for the wire, which nobody changes afterwards.  Any thread.

        Raises TypeError or ValueError, at the sender, for what cannot be sent; the session is unharmed.
        """

    def eof(self) -> Iterable[M]:
        """The messages that the clean end of the stream completes: none, by default.  One thread at a time.

        Called once, after the peer's close_notify.  After a truncated or aborted stream it is not called:
        no end was seen, so nothing is complete.
        """
        return ()


class Raw(Codec[bytes]):
    """Bytes, just as they arrive.  A message has no boundaries: TLS may cut and join what was sent.

    *max_length*: the most bytes one `encode` takes; None leaves it to `bridge.Limits`.
    """

    __slots__ = ("_max_length",)

    def __init__(self, max_length: int | None = None) -> None:
        self._max_length = None if max_length is None else _checked_length("Raw", max_length)

    def decode(self, data: bytes) -> Iterable[bytes]:
        """*data* itself, uncopied."""
        return [data] if data else []

    def encode(self, message: BytesLike) -> bytes:
        """*message*, copied only if it could change.  TypeError if no buffer, ValueError if too large."""
        if type(message) is bytes and self._max_length is None:
            return message
        return _frozen("Raw", message, self._max_length)

    buffered = 0
    """Bytes held of an incomplete message: none, ever."""


class _Framed(Codec[M]):
    """What the codecs with message boundaries share: the bytes held, and the first error, which stays.

    There is no way back into step with a stream once it made no sense, so after an error every call
    raises a copy of it.  The subclass's generators never run unfinished: `_collect` exhausts them, so the
    state is settled when `decode` returns, even if its caller does not look at the result.
    """

    __slots__ = ("_failure", "_held", "_max_length")

    def __init__(self, max_length: int) -> None:
        self._max_length = _checked_length(type(self).__name__, max_length)
        # Touched by decode and eof only:
        self._held = bytearray()  # the beginning of a message whose end has not come
        self._failure: CodecError | None = None

    @abc.abstractmethod
    def _parse(self, data: bytes) -> Iterator[M]:
        """Yield the messages *data* completes and hold the rest; raise CodecError at the first bad one."""

    @abc.abstractmethod
    def _unfinished(self) -> str:
        """What to say when the stream ends while bytes are held."""

    def decode(self, data: bytes) -> Iterable[M]:
        """The messages that *data* completes.  One thread at a time.

        Raises CodecError (MessageTooLarge) for a bad message: at once if there was no good one before it in
        *data*, else while iterating, after the good ones.  Every later call raises the same.
        """
        return self._collect(self._parse(data))

    def eof(self) -> Iterable[M]:
        """Nothing; or CodecError if the stream ended inside a message.  One thread at a time."""
        return self._collect(self._finish())

    @property
    def buffered(self) -> int:
        """Bytes held of an incomplete message.  Any thread."""
        return len(self._held)

    def _finish(self) -> Iterator[M]:
        if self._held:
            raise CodecError(self._unfinished())
        yield from ()

    def _collect(self, parsed: Iterator[M]) -> Iterable[M]:
        if self._failure is not None:
            raise fresh(self._failure)
        messages: list[M] = []
        try:
            for message in parsed:
                messages.append(message)  # extend need not keep what came before an error
            return messages
        except CodecError as error:
            failure = self._failure = fresh(error)
        self._held.clear()
        if messages:
            return _followed_by(messages, failure)
        raise fresh(failure)


class _Terminated(_Framed[M]):
    """A message ends where *end* is first found; *start* must come before it.

    Cost: held bytes hold no *end*, so the search goes on where the last one stopped, and a byte is copied
    a fixed number of times however the stream was cut.  A chunk of whole messages is split at once.
    """

    __slots__ = ("_end", "_longest_end", "_start")

    def __init__(self, start: bytes, end: bytes, longest_end: bytes, max_length: int) -> None:
        super().__init__(max_length)
        self._start = start
        self._end = end
        self._longest_end = longest_end

    @abc.abstractmethod
    def _message(self, frame: bytes) -> M:
        """The message in *frame*, which came before an *end*; raise CodecError if it is bad."""

    def _parse(self, data: bytes) -> Iterator[M]:
        held, end = self._held, self._end
        if held:
            searched = max(0, len(held) - len(end) + 1)
            held += data
            if held.find(end, searched) < 0:
                self._check_partial()
                return
            data = bytes(held)
            held.clear()
        frames = data.split(end)
        rest = frames.pop()
        for frame in frames:
            yield self._message(frame)
        held += rest
        self._check_partial()

    def _check_partial(self) -> None:
        """Raise CodecError if no continuation can make a good message of what is held."""
        held, start = self._held, self._start
        if not held.startswith(start[: len(held)]):
            raise CodecError(self._bad_start(bytes(held[: len(start)])))
        if len(held) - len(start) > self._max_length:
            self._check_size(len(held) - len(start) - _overlap(held, self._longest_end))

    def _check_size(self, size: int) -> None:
        if size > self._max_length:
            limit = f"{self._max_length} bytes (max_length of {type(self).__name__})"
            raise MessageTooLarge(f"the peer's message is over the limit of {limit}")

    def _bad_start(self, found: bytes) -> str:
        return f"the peer's message begins with {found!r} instead of {self._start!r}"


class Lines(_Terminated[str]):
    """Text lines, as str without their ends.

    Received lines end at each ``\\n``, and any ``\\r`` right before it belongs to the end.  So a message
    never holds ``\\n`` nor ends with ``\\r``, and every received line can be sent again.  Where a lone
    ``\\n`` must not end a line, use ``Delimited(b"\\r\\n")``.

    *encoding*: UTF-8 or another that contains ASCII, so that the byte 10 is always a newline; UTF-16 is not.
    *newline*: what is sent after each line, ``"\\n"`` or ``"\\r\\n"``; both are received either way.
    *max_length*: the most bytes of one encoded line, without its end.
    *allow_unterminated*: at the clean end of the stream, deliver what came after the last newline as a line.
    By default it is a CodecError, since a cut-off line must not look like a whole one.
    """

    __slots__ = ("_allow_unterminated", "_encoding", "_newline")

    def __init__(
        self,
        encoding: str = "utf-8",
        newline: Literal["\n", "\r\n"] = "\n",
        *,
        max_length: int = MAX_LENGTH,
        allow_unterminated: bool = False,
    ) -> None:
        super().__init__(b"", b"\n", b"\r\n", max_length)
        _check_encoding(encoding)
        if newline not in ("\n", "\r\n"):
            raise ConfigurationError(
                f"Lines: newline must be '\\n' or '\\r\\n', not {newline!r}; for another end use Delimited"
            )
        self._encoding = encoding
        self._newline = newline.encode()
        self._allow_unterminated = allow_unterminated

    def encode(self, message: str) -> bytes:
        """*message* and a newline.  Any thread.

        Raises TypeError for anything but a str; ValueError if it holds ``\\n``, ends with ``\\r``, is too
        large, or has a character the encoding lacks (UnicodeEncodeError).
        """
        if not isinstance(message, str):
            raise TypeError(f"Lines sends str, not {type(message).__name__}")
        if "\n" in message:
            raise ValueError(f"a line cannot hold a newline, but has one at index {message.index(chr(10))}")
        if message.endswith("\r"):
            raise ValueError(
                "a line cannot end with a carriage return: it would be taken for part of the newline"
            )
        line = message.encode(self._encoding)
        _check_outgoing("Lines", len(line), self._max_length)
        return line + self._newline

    def _message(self, frame: bytes) -> str:
        if len(frame) > self._max_length:
            self._check_size(len(frame) - frame.endswith(b"\r"))
        try:
            return frame.rstrip(b"\r").decode(self._encoding)
        except UnicodeDecodeError as error:
            # Without its traceback: the session keeps this error, and frames would keep the data.
            raise CodecError(
                f"the peer's line is not {self._encoding}: {error.reason} at byte {error.start}"
            ) from error.with_traceback(None)

    def _finish(self) -> Iterator[str]:
        if self._held and self._allow_unterminated:
            frame = bytes(self._held)
            self._held.clear()
            yield self._message(frame)
        yield from super()._finish()

    def _unfinished(self) -> str:
        return f"the stream ended inside a line: {len(self._held)} bytes came after the last newline"


class LengthPrefixed(_Framed[bytes]):
    """Binary messages, each after its length.

    *header*: how many bytes the length takes: 1, 2, 3, 4 or 8.
    *byteorder*: ``"big"`` (network order) or ``"little"``.
    *includes_header*: whether the length counts the header too.
    *max_length*: the most bytes of one message without its header, or what the header can count if less.
    """

    __slots__ = ("_byteorder", "_extra", "_header", "_needed")

    def __init__(
        self,
        header: int = 4,
        *,
        byteorder: Literal["big", "little"] = "big",
        includes_header: bool = False,
        max_length: int = MAX_LENGTH,
    ) -> None:
        super().__init__(max_length)
        if isinstance(header, bool) or not isinstance(header, int):
            raise TypeError(f"LengthPrefixed: header must be a whole number of bytes, not {header!r}")
        if header not in (1, 2, 3, 4, 8):
            raise ConfigurationError(f"LengthPrefixed: header must be 1, 2, 3, 4 or 8 bytes, not {header}")
        if byteorder not in ("big", "little"):
            raise ConfigurationError(f"LengthPrefixed: byteorder is 'big' or 'little', not {byteorder!r}")
        self._header = header
        self._byteorder: Literal["big", "little"] = byteorder
        self._extra = header if includes_header else 0
        self._max_length = min(max_length, (1 << 8 * header) - 1 - self._extra)
        self._needed = header  # bytes to hold before looking again; touched by decode only

    def encode(self, message: BytesLike) -> bytes:
        """The length, then *message*.  Any thread.  TypeError if it is no buffer, ValueError if too large."""
        body = _frozen("LengthPrefixed", message, self._max_length)
        return (len(body) + self._extra).to_bytes(self._header, self._byteorder) + body

    def _parse(self, data: bytes) -> Iterator[bytes]:
        held, header = self._held, self._header
        if held:
            held += data
            if len(held) < self._needed:
                return
            data = bytes(held)
            held.clear()
        position, self._needed = 0, header
        while len(data) - position >= header:
            begin = position + header
            end = begin + self._length(data[position:begin])
            if end > len(data):
                self._needed = end - position
                break
            yield data[begin:end]
            position = end
        held += data[position:]

    def _length(self, header: bytes) -> int:
        length = int.from_bytes(header, self._byteorder) - self._extra
        if length < 0:
            raise CodecError(
                f"the peer announces a length of {length + self._extra}, which cannot include its header of"
                f" {self._header} bytes"
            )
        if length > self._max_length:
            limit = f"{self._max_length} bytes (max_length of {type(self).__name__})"
            raise MessageTooLarge(
                f"the peer announces a message of {length} bytes, over the limit of {limit}"
            )
        return length

    def _unfinished(self) -> str:
        came, header = len(self._held), self._header
        if came < header:
            return f"the stream ended inside a message's header: {came} of {header} bytes came"
        return f"the stream ended inside a message: {came - header} of {self._needed - header} bytes came"


class Delimited(_Terminated[bytes]):
    """Binary messages, each ended by *delimiter* and, if *start* is given, begun by it.

    The default delimiter is a newline, as of `Lines`, but nothing is stripped and nothing decoded.  MLLP
    (HL7) is ``Delimited(b"\\x1c\\r", start=b"\\x0b")``.  After a delimiter, anything but *start* is an error.

    *max_length*: the most bytes of one message, without *start* and *delimiter*.
    """

    __slots__ = ()

    def __init__(self, delimiter: bytes = b"\n", *, start: bytes = b"", max_length: int = MAX_LENGTH) -> None:
        for name, value in (("delimiter", delimiter), ("start", start)):
            if not isinstance(value, bytes):
                raise TypeError(f"Delimited: {name} must be bytes, not {type(value).__name__}")
        if not delimiter:
            raise ConfigurationError("Delimited: delimiter must not be empty")
        if delimiter in start or _overlap(start, delimiter):
            raise ConfigurationError(
                f"Delimited: start {start!r} must neither hold {delimiter!r} nor end with its beginning"
            )
        super().__init__(start, delimiter, delimiter, max_length)

    def encode(self, message: BytesLike) -> bytes:
        """*start*, *message* and *delimiter*.  Any thread.

        Raises TypeError if it is no buffer; ValueError if it is too large, or if the delimiter would be found
        before its end (it holds it, or ends with a part that together with the delimiter gives it earlier).
        """
        body = _frozen("Delimited", message, self._max_length)
        frame = self._start + body + self._end
        found = frame.find(self._end, len(self._start)) - len(self._start)
        if found < len(body):
            raise ValueError(f"the message cannot be sent: {self._end!r} would end it at byte {found}")
        return frame

    def _message(self, frame: bytes) -> bytes:
        start = self._start
        if not frame.startswith(start):
            raise CodecError(self._bad_start(frame[: len(start)]))
        self._check_size(len(frame) - len(start))
        return frame[len(start) :]

    def _unfinished(self) -> str:
        return f"the stream ended inside a message: {len(self._held)} bytes came, but not {self._end!r}"


def made_by(factory: Callable[[], Codec[Any]]) -> Codec[Any]:
    """The codec of one session; ConfigurationError if *factory* makes none.  Any thread."""
    if not callable(factory):
        raise ConfigurationError(
            f"codec must be a factory, a class or a function that makes one codec a session, not {factory!r}"
        )
    made = factory()
    missing = [name for name in ("decode", "encode", "eof") if not callable(getattr(made, name, None))]
    if missing or isinstance(made, type):
        raise ConfigurationError(
            f"codec made {made!r}, which is no codec: it lacks {', '.join(missing) or 'an instance'}"
        )
    return made


def _followed_by(messages: list[M], failure: CodecError) -> Iterator[M]:
    yield from messages
    raise fresh(failure)


def _overlap(held: bytes | bytearray, end: bytes) -> int:
    """How many bytes at the end of *held* may be the beginning of *end*."""
    return next((count for count in range(len(end) - 1, 0, -1) if held.endswith(end[:count])), 0)


def _frozen(codec: str, message: BytesLike, max_length: int | None) -> bytes:
    """*message* as bytes that cannot change; TypeError and ValueError speak for *codec*."""
    if isinstance(message, str):
        raise TypeError(f"{codec} sends bytes, not str: encode it first, or use the codec Lines")
    try:
        view = memoryview(message)
    except TypeError:
        kind = type(message).__name__
        raise TypeError(f"{codec} sends bytes, bytearray or memoryview, not {kind}") from None
    with view:
        _check_outgoing(codec, view.nbytes, max_length)
        return message if type(message) is bytes else view.tobytes()


def _check_outgoing(codec: str, size: int, max_length: int | None) -> None:
    if max_length is not None and size > max_length:
        raise ValueError(f"{codec} cannot send a message of {size} bytes: the limit is {max_length} bytes")


def _checked_length(codec: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{codec}: max_length must be a whole number of bytes, not {value!r}")
    if value < 1:
        raise ConfigurationError(f"{codec}: max_length must be at least 1 byte, not {value}")
    return value


def _check_encoding(encoding: str) -> None:
    """ConfigurationError unless *encoding* contains ASCII and has no escapes that could hide a newline."""
    if not isinstance(encoding, str):
        raise TypeError(f"Lines: encoding must be str, not {type(encoding).__name__}")
    text = "".join(map(chr, range(128))) + r"\n\x0a\u000a"
    try:
        plain = text.encode(encoding) == text.encode() and text.encode().decode(encoding) == text
    except LookupError:
        raise ConfigurationError(f"Lines: {encoding!r} is not a text encoding that Python knows") from None
    except ValueError:
        plain = False
    if not plain:
        raise ConfigurationError(
            f"Lines: encoding {encoding!r} does not hold ASCII unchanged, so a newline is no byte of its own"
        )
