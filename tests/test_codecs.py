"""The codecs, without a session: cuts, limits, garbage, the words of every error, and who may call what."""

from __future__ import annotations

import array
import concurrent.futures
import contextlib
import functools
import gc
import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bridge.codecs import MAX_LENGTH, Codec, Delimited, LengthPrefixed, Lines, Raw
from bridge.errors import BridgeError, CodecError, ConfigurationError, MessageTooLarge, SessionEnded

LIMIT = 24  # small, so that short inputs reach it

quickly = settings(deadline=None, max_examples=100, database=None)

PREFIXES: list[tuple[int, Literal["big", "little"], bool]] = [
    (1, "big", True),
    (2, "little", True),
    (3, "big", False),
    (4, "big", False),
    (8, "little", True),
]
FRAMED: dict[str, Callable[[], Any]] = {
    "lines": lambda: Lines(max_length=LIMIT),
    "lines crlf": lambda: Lines(newline="\r\n", max_length=LIMIT),
    "lines latin-1": lambda: Lines("latin-1", max_length=LIMIT),
    "lines lenient": lambda: Lines(max_length=LIMIT, allow_unterminated=True),
    **{
        f"prefix {header} {order} {'whole' if whole else 'body'}": functools.partial(
            LengthPrefixed, header, byteorder=order, includes_header=whole, max_length=LIMIT
        )
        for header, order, whole in PREFIXES
    },
    "delimited": lambda: Delimited(max_length=LIMIT),
    "delimited crlf": lambda: Delimited(b"\r\n", max_length=LIMIT),
    "mllp": lambda: Delimited(b"\x1c\r", start=b"\x0b", max_length=LIMIT),
    "delimited aa": lambda: Delimited(b"aa", max_length=LIMIT),
    "delimited abab": lambda: Delimited(b"abab", start=b"\x0bcc", max_length=LIMIT),
}
BYTES_CODECS: dict[str, Callable[[], Any]] = {
    "Raw": Raw,
    "LengthPrefixed": LengthPrefixed,
    "Delimited": Delimited,
}

framed = pytest.mark.parametrize("make", FRAMED.values(), ids=FRAMED.keys())

texts = st.text(st.sampled_from("ab\r\n\0 é€😀") | st.characters(codec="utf-8"), max_size=LIMIT)
blobs = st.text("ab\r\n\x0b\x1c\0", max_size=LIMIT).map(str.encode) | st.binary(max_size=LIMIT)
garbage = (
    st.text("ab\r\n\x0b\x0c\x1c\0c", max_size=6 * LIMIT).map(str.encode)
    | st.binary(max_size=6 * LIMIT)
    | st.lists(
        st.sampled_from([b"\x0b", b"\x1c\r", b"\r\n", b"aa", b"\0\0\0\1", b"\xff", b"abab", b"\x0bcc"])
    ).map(b"".join)
)


def cut(data: bytes, at: Iterable[int]) -> list[bytes]:
    """*data* in pieces, cut at each index (modulo its length)."""
    marks = sorted({index % (len(data) + 1) for index in at} | {0, len(data)})
    return [data[begin:end] for begin, end in itertools.pairwise(marks)]


def collect(step: Callable[[], Iterable[Any]]) -> tuple[list[Any], CodecError | None]:
    """All messages of one call as the coordinator sees them, and the error after them.  Others fail."""
    messages: list[Any] = []
    try:
        for message in step():
            messages.append(message)
    except CodecError as error:
        return messages, error
    return messages, None


def outcome(codec: Any, chunks: Iterable[bytes]) -> tuple[list[Any], type[CodecError] | None]:
    """Feed *chunks*, then the end of the stream, as the coordinator does; what came out of it."""
    messages: list[Any] = []
    steps: list[Callable[[], Iterable[Any]]] = [lambda chunk=chunk: codec.decode(chunk) for chunk in chunks]  # type: ignore[misc]
    for step in [*steps, codec.eof]:
        more, error = collect(step)
        messages += more
        if error is not None:
            return messages, type(error)
    return messages, None


def encodable(codec: Any, candidates: Iterable[object]) -> tuple[list[Any], bytes]:
    """Those of *candidates* that *codec* agrees to send, and their bytes."""
    kept: list[Any] = []
    wire = b""
    for message in candidates:
        with contextlib.suppress(ValueError):
            wire += codec.encode(message)
            kept.append(message)
    return kept, wire


def state_of(codec: Any) -> dict[str, Any]:
    """Everything a codec holds, by value."""
    names = [name for cls in type(codec).__mro__ for name in getattr(cls, "__slots__", ())]
    values = {name: getattr(codec, name) for name in names}
    return {name: bytes(value) if isinstance(value, bytearray) else value for name, value in values.items()}


class TestRoundTrip:
    @framed
    @quickly
    @given(data=st.data())
    def test_any_cut_gives_the_same_messages(self, make: Callable[[], Any], data: st.DataObject) -> None:
        codec = make()
        messages = data.draw(st.lists(texts if isinstance(codec, Lines) else blobs, max_size=8))
        messages, wire = encodable(codec, messages)
        chunks = cut(wire, data.draw(st.lists(st.integers(min_value=0), max_size=12)))
        assert outcome(codec, chunks) == (messages, None)
        assert outcome(make(), cut(wire, range(len(wire)))) == (messages, None)
        assert codec.buffered == 0

    @pytest.mark.parametrize(
        ("make", "message", "wire"),
        [
            (lambda: Lines(), "héllo", b"h\xc3\xa9llo\n"),
            (lambda: Lines("latin-1", "\r\n"), "héllo", b"h\xe9llo\r\n"),
            (lambda: Lines(), "a\rb", b"a\rb\n"),
            (lambda: Lines(), "", b"\n"),
            (lambda: LengthPrefixed(), b"abc", b"\0\0\0\3abc"),
            (lambda: LengthPrefixed(1), b"abc", b"\3abc"),
            (lambda: LengthPrefixed(2, byteorder="little"), b"abc", b"\3\0abc"),
            (lambda: LengthPrefixed(3), b"", b"\0\0\0"),
            (lambda: LengthPrefixed(2, includes_header=True), b"abc", b"\0\5abc"),
            (lambda: LengthPrefixed(8, byteorder="little", includes_header=True), b"", b"\x08" + bytes(7)),
            (lambda: Delimited(), b"abc\r", b"abc\r\n"),
            (lambda: Delimited(b"\x1c\r", start=b"\x0b"), b"MSH|\rPID|", b"\x0bMSH|\rPID|\x1c\r"),
        ],
    )
    def test_the_bytes_on_the_wire(self, make: Callable[[], Any], message: object, wire: bytes) -> None:
        assert make().encode(message) == wire
        assert list(make().decode(wire)) == [message]

    @pytest.mark.parametrize("make", [Raw, Lines, LengthPrefixed, Delimited])
    def test_the_class_itself_is_a_factory_of_codecs(self, make: Callable[[], Codec[Any]]) -> None:
        assert isinstance(make(), Codec)
        assert make().encode("a" if make is Lines else b"a")

    @framed
    def test_messages_are_complete_as_soon_as_their_last_byte_is_there(self, make: Callable[[], Any]) -> None:
        codec = make()
        message = "xy" if isinstance(codec, Lines) else b"xy"
        wire = codec.encode(message)
        for count, byte in enumerate(wire[:-1], start=1):
            assert list(codec.decode(bytes([byte]))) == []
            assert codec.buffered == count
        assert list(codec.decode(wire[-1:])) == [message]
        assert codec.buffered == 0

    @framed
    def test_decode_takes_the_bytes_even_if_nobody_looks_at_the_messages(
        self, make: Callable[[], Any]
    ) -> None:
        codec = make()
        message = "xy" if isinstance(codec, Lines) else b"xy"
        wire: bytes = codec.encode(message)
        codec.decode(wire + wire[:1])
        assert list(codec.decode(wire[1:])) == [message]

    @quickly
    @given(text=texts)
    @example("a\r\r\n")
    @example("a\r\nb\n\r\n")
    def test_lines_end_at_every_newline_and_lose_the_carriage_returns_before_it(self, text: str) -> None:
        *lines, rest = text.split("\n")
        expected = [line.rstrip("\r") for line in lines]
        assert list(Lines().decode(text.encode())) == expected
        assert outcome(Lines(), [text.encode()]) == (expected, CodecError if rest else None)

    @framed
    @quickly
    @given(data=garbage)
    def test_whatever_was_received_can_be_sent_again(self, make: Callable[[], Any], data: bytes) -> None:
        messages, _ = outcome(make(), [data])
        assert encodable(make(), messages)[0] == messages

    @quickly
    @given(
        delimiter=st.text("ab", min_size=1, max_size=4).map(str.encode),
        start=st.text("abc", max_size=3).map(str.encode),
        messages=st.lists(st.text("abc", max_size=6).map(str.encode), max_size=5),
    )
    @example(delimiter=b"aa", start=b"", messages=[b"a", b"ba", b"b"])
    def test_delimiters_that_overlap_themselves(
        self, delimiter: bytes, start: bytes, messages: list[bytes]
    ) -> None:
        try:
            codec = Delimited(delimiter, start=start)
        except ConfigurationError:
            assert start, "only start bytes can be at odds with the delimiter"
            return
        kept, wire = encodable(codec, messages)
        assert outcome(codec, cut(wire, range(len(wire)))) == (kept, None)
        refused = [message for message in messages if message not in kept]
        assert all((message + delimiter).find(delimiter) < len(message) for message in refused)


class TestGarbage:
    @framed
    @quickly
    @given(data=garbage, at=st.lists(st.integers(min_value=0), max_size=12))
    def test_ends_in_messages_or_a_codec_error_however_it_is_cut(
        self, make: Callable[[], Any], data: bytes, at: list[int]
    ) -> None:
        whole = outcome(make(), [data])
        assert outcome(make(), cut(data, at)) == whole
        assert outcome(make(), cut(data, range(len(data)))) == whole

    @framed
    @quickly
    @given(data=garbage, at=st.lists(st.integers(min_value=0), max_size=12))
    def test_never_holds_more_than_one_message_and_its_framing(
        self, make: Callable[[], Any], data: bytes, at: list[int]
    ) -> None:
        codec = make()
        framing = len(codec.encode("" if isinstance(codec, Lines) else b"")) + isinstance(codec, Lines)
        for chunk in cut(data, at):
            _, error = collect(lambda chunk=chunk: codec.decode(chunk))  # type: ignore[misc]
            assert codec.buffered < LIMIT + framing
            if error is not None:
                assert codec.buffered == 0
                break

    @pytest.mark.parametrize(
        ("make", "good", "bad", "words"),
        [
            (
                lambda: Lines(),
                b"a\nb\n",
                b"\xff\nc\n",
                "the peer's line is not utf-8: invalid start byte at byte 0",
            ),
            (
                lambda: Lines("ascii"),
                b"a\nb\n",
                b"x\xe9\n",
                "the peer's line is not ascii: ordinal not in range",
            ),
            (
                lambda: Lines(max_length=3),
                b"a\nb\n",
                b"four",
                "the peer's message is over the limit of 3 bytes (max_length of Lines)",
            ),
            (
                lambda: Delimited(max_length=3),
                b"a\nb\n",
                b"four\n",
                "the peer's message is over the limit of 3 bytes (max_length of Delimited)",
            ),
            (
                lambda: Delimited(b";", start=b"<<"),
                b"<<a;<<b;",
                b"<x",
                "the peer's message begins with b'<x' instead of b'<<'",
            ),
            (
                lambda: Delimited(b";", start=b"<<"),
                b"<<a;<<b;",
                b"<;",
                "the peer's message begins with b'<' instead of b'<<'",
            ),
            (
                lambda: LengthPrefixed(1, max_length=3),
                b"\1a\1b",
                b"\4",
                "the peer announces a message of 4 bytes, over the limit of 3 bytes (max_length of Length",
            ),
            (
                lambda: LengthPrefixed(2, includes_header=True),
                b"\0\3a\0\3b",
                b"\0\1",
                "the peer announces a length of 1, which cannot include its header of 2 bytes",
            ),
        ],
    )
    def test_good_messages_first_then_the_error_and_ever_after(
        self, make: Callable[[], Any], good: bytes, bad: bytes, words: str
    ) -> None:
        codec = make()
        first = collect(lambda: codec.decode(good + bad))
        assert len(first[0]) == 2
        errors = [first[1], *(collect(step)[1] for step in (lambda: codec.decode(good), codec.eof))]
        for error in errors:
            assert isinstance(error, CodecError)
            assert isinstance(error, (SessionEnded, ValueError))
            assert str(error).startswith(words)
        assert len({id(error) for error in errors}) == 3, "each caller gets its own copy"
        assert len({(type(error), str(error)) for error in errors}) == 1, "of one and the same error"
        assert codec.buffered == 0

    def test_the_error_alone_is_raised_by_the_call(self) -> None:
        codec = Lines(max_length=3)
        with pytest.raises(MessageTooLarge):
            codec.decode(b"four")
        with pytest.raises(MessageTooLarge):
            codec.eof()

    def test_a_decoding_error_names_its_cause_but_keeps_no_frames(self) -> None:
        with pytest.raises(CodecError) as caught:
            Lines().decode(b"\xff\n")
        cause = caught.value.__cause__
        assert isinstance(cause, UnicodeDecodeError)
        assert cause.__traceback__ is None

    @pytest.mark.parametrize("data", [b"\1a\4", b"\4"])
    def test_the_kept_error_holds_no_data(self, data: bytes) -> None:
        class Chunk(bytes):
            pass

        codec = LengthPrefixed(1, max_length=3)
        collect(lambda: codec.decode(Chunk(data)))
        gc.collect()
        assert not [thing for thing in gc.get_objects() if type(thing) is Chunk]


class TestLimits:
    @framed
    def test_a_message_at_the_limit_passes_and_one_over_it_does_not(self, make: Callable[[], Any]) -> None:
        codec = make()
        unit: Any = "x" if isinstance(codec, Lines) else b"x"
        wire = codec.encode(unit * LIMIT)
        assert list(codec.decode(wire)) == [unit * LIMIT]
        assert outcome(codec, cut(wire, range(len(wire)))) == ([unit * LIMIT], None)
        name = type(codec).__name__
        with pytest.raises(
            ValueError, match=f"^{name} cannot send a message of 25 bytes: the limit is 24 bytes$"
        ) as caught:
            codec.encode(unit * (LIMIT + 1))
        assert not isinstance(caught.value, BridgeError), "the sender's mistake ends no session"

    @framed
    def test_the_peers_message_over_the_limit(self, make: Callable[[], Any]) -> None:
        sender = make()
        sender._max_length += 1
        unit: Any = "x" if isinstance(sender, Lines) else b"x"
        wire = sender.encode(unit * (LIMIT + 1))
        assert outcome(make(), [wire]) == ([], MessageTooLarge)
        assert outcome(make(), cut(wire, range(len(wire)))) == ([], MessageTooLarge)

    @pytest.mark.parametrize(
        ("make", "proof"),
        [
            (lambda: Lines(max_length=4), b"fives"),
            (lambda: Lines(max_length=4), b"four\rx"),
            (lambda: Lines(max_length=4), b"four\r\r"),
            (lambda: Delimited(b"\r\n", max_length=4), b"four\rx"),
            (lambda: Delimited(b"abab", max_length=4), b"fourabaa"),
            (lambda: Delimited(b"abab", max_length=4), b"fourac"),
            (lambda: Delimited(b"\x1c\r", start=b"\x0b", max_length=4), b"\x0bfour\x1cx"),
            (lambda: LengthPrefixed(2, max_length=4), b"\0\5"),
            (lambda: LengthPrefixed(2, max_length=4), b"\xff\xff"),
        ],
    )
    def test_is_enforced_at_the_very_byte_that_proves_it(self, make: Callable[[], Any], proof: bytes) -> None:
        codec = make()
        for byte in proof[:-1]:
            assert list(codec.decode(bytes([byte]))) == []
        with pytest.raises(MessageTooLarge):
            codec.decode(proof[-1:])

    def test_of_lines_counts_encoded_bytes_without_the_line_end(self) -> None:
        codec = Lines(max_length=4, newline="\r\n")
        assert codec.encode("éé") == "éé\r\n".encode()
        assert list(codec.decode("éé\r\nfour\r\n".encode())) == ["éé", "four"]
        with pytest.raises(ValueError, match="6 bytes: the limit is 4"):
            codec.encode("ééé")

    @pytest.mark.parametrize(
        ("header", "whole", "most"), [(1, False, 255), (1, True, 254), (2, False, 65535)]
    )
    def test_of_a_short_header_is_what_it_can_count(self, header: int, whole: bool, most: int) -> None:
        codec = LengthPrefixed(header, includes_header=whole)
        assert list(codec.decode(codec.encode(bytes(most)))) == [bytes(most)]
        with pytest.raises(
            ValueError, match=f"^LengthPrefixed cannot send .* {most + 1} bytes: the limit is {most} "
        ):
            codec.encode(bytes(most + 1))

    @pytest.mark.parametrize("make", [Lines, LengthPrefixed, Delimited])
    def test_default(self, make: Callable[[], Any]) -> None:
        unit: Any = "x" if make is Lines else b"x"
        assert list(make().decode(make().encode(unit * MAX_LENGTH))) == [unit * MAX_LENGTH]
        with pytest.raises(ValueError, match="limit is 1048576 bytes"):
            make().encode(unit * (MAX_LENGTH + 1))

    def test_of_raw_is_none_unless_given(self) -> None:
        assert Raw().encode(bytes(MAX_LENGTH + 1)) == bytes(MAX_LENGTH + 1)
        assert Raw(3).encode(b"abc") == b"abc"
        with pytest.raises(ValueError, match=r"^Raw cannot send a message of 4 bytes: the limit is 3 bytes$"):
            Raw(3).encode(b"four")


class TestEncode:
    @pytest.mark.parametrize("make", BYTES_CODECS.values(), ids=BYTES_CODECS.keys())
    @pytest.mark.parametrize(
        "message",
        [
            bytearray(b"abcd"),
            memoryview(b"abcd"),
            memoryview(b"a.b.c.d.")[::2],
            array.array("B", b"abcd"),
            type("Bytes", (bytes,), {})(b"abcd"),
        ],
        ids=["bytearray", "memoryview", "strided", "array", "subclass"],
    )
    def test_any_buffer_is_sent_as_immutable_bytes(self, make: Callable[[], Any], message: Any) -> None:
        wire = make().encode(message)
        assert type(wire) is bytes
        assert wire == make().encode(b"abcd")

    @pytest.mark.parametrize("make", BYTES_CODECS.values(), ids=BYTES_CODECS.keys())
    def test_a_buffer_changed_after_encode_changes_nothing(self, make: Callable[[], Any]) -> None:
        buffer = bytearray(b"abcd")
        wire = make().encode(buffer)
        buffer[:] = b"a longer one"  # would be a BufferError if encode had kept it
        assert list(make().decode(wire)) == [b"abcd"]

    def test_limits_count_the_bytes_of_a_buffer_not_its_items(self) -> None:
        wide = array.array("I", [1, 2])
        with pytest.raises(ValueError, match=f"of {2 * wide.itemsize} bytes"):
            Raw(2 * wide.itemsize - 1).encode(memoryview(wide))

    def test_raw_copies_nothing(self) -> None:
        data = b"some bytes"
        assert Raw().encode(data) is data
        (received,) = Raw().decode(data)
        assert received is data

    @pytest.mark.parametrize("make", BYTES_CODECS.values(), ids=BYTES_CODECS.keys())
    @pytest.mark.parametrize("message", [5, None, ["a"], object()], ids=["int", "None", "list", "object"])
    def test_what_is_no_buffer_is_a_type_error(self, make: Callable[[], Any], message: object) -> None:
        name, kind = type(make()).__name__, type(message).__name__
        with pytest.raises(TypeError, match=f"^{name} sends bytes, bytearray or memoryview, not {kind}$"):
            make().encode(message)

    @pytest.mark.parametrize("make", BYTES_CODECS.values(), ids=BYTES_CODECS.keys())
    def test_a_str_for_a_codec_of_bytes_is_told_what_to_do(self, make: Callable[[], Any]) -> None:
        with pytest.raises(
            TypeError, match=r"sends bytes, not str: encode it first, or use the codec Lines$"
        ):
            make().encode("hello")

    @pytest.mark.parametrize("message", [b"hello", 5, None])
    def test_lines_sends_str_only(self, message: Any) -> None:
        with pytest.raises(TypeError, match=f"^Lines sends str, not {type(message).__name__}$"):
            Lines().encode(message)

    @pytest.mark.parametrize("newline", ["\n", "\r\n"])
    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("ab\ncd", "^a line cannot hold a newline, but has one at index 2$"),
            ("ab\r\n", "^a line cannot hold a newline, but has one at index 3$"),
            ("ab\r", "^a line cannot end with a carriage return: it would be taken for part of the newline$"),
        ],
    )
    def test_a_line_that_would_be_read_otherwise(self, newline: Any, line: str, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            Lines(newline=newline).encode(line)

    @pytest.mark.parametrize(("encoding", "line"), [("ascii", "é"), ("utf-8", "\ud800")])
    def test_a_character_the_encoding_lacks_is_a_value_error(self, encoding: str, line: str) -> None:
        with pytest.raises(ValueError, match=r"can't encode character .* in position 0"):
            Lines(encoding).encode(line)

    @pytest.mark.parametrize(
        ("codec", "message", "words"),
        [
            (Delimited(b"\r\n"), b"ab\r\ncd", r"b'\r\n' would end it at byte 2"),
            (Delimited(b"\x1c\r", start=b"\x0b"), b"\x1c\r", r"b'\x1c\r' would end it at byte 0"),
            (Delimited(b"aa"), b"ba", "b'aa' would end it at byte 1"),
        ],
    )
    def test_a_message_that_holds_the_delimiter(self, codec: Delimited, message: bytes, words: str) -> None:
        with pytest.raises(ValueError, match=r"^the message cannot be sent: ") as caught:
            codec.encode(message)
        assert str(caught.value).endswith(words)


class TestEndOfStream:
    @pytest.mark.parametrize(
        ("make", "data", "words"),
        [
            (Lines, b"whole\npart", "the stream ended inside a line: 4 bytes came after the last newline"),
            (Delimited, b"whole\npart", r"the stream ended inside a message: 4 bytes came, but not b'\n'"),
            (LengthPrefixed, b"\0\0\0\1x\0", "the stream ended inside a message's header: 1 of 4 bytes came"),
            (LengthPrefixed, b"\0\0\0\1x\0\0\0\7xy", "the stream ended inside a message: 2 of 7 bytes came"),
        ],
    )
    def test_inside_a_message_is_an_error_that_stays(
        self, make: Callable[[], Any], data: bytes, words: str
    ) -> None:
        codec = make()
        assert len(list(codec.decode(data))) == 1
        for step in (codec.eof, codec.eof, lambda: codec.decode(data)):
            messages, error = collect(step)
            assert messages == []
            assert type(error) is CodecError
            assert str(error) == words

    @pytest.mark.parametrize("make", [Raw, *FRAMED.values()], ids=["raw", *FRAMED])
    def test_between_messages_is_nothing(self, make: Callable[[], Any]) -> None:
        codec = make()
        codec.decode(codec.encode("x" if isinstance(codec, Lines) else b"x"))
        assert list(codec.eof()) == []
        assert codec.buffered == 0

    @pytest.mark.parametrize(
        ("data", "last"), [(b"part", "part"), (b"part\r", "part"), (b"\r", ""), (b"a\nb", "b")]
    )
    def test_delivers_an_unterminated_line_if_asked_to(self, data: bytes, last: str) -> None:
        codec = Lines(allow_unterminated=True)
        codec.decode(data)
        assert list(codec.eof()) == [last]
        assert list(codec.eof()) == []

    def test_refuses_an_unterminated_line_that_is_bad(self) -> None:
        codec = Lines(allow_unterminated=True)
        codec.decode(b"a\xe2\x82")
        with pytest.raises(
            CodecError, match=r"^the peer's line is not utf-8: unexpected end of data at byte 1$"
        ):
            codec.eof()


class TestConstruction:
    @pytest.mark.parametrize("make", [Raw, Lines, LengthPrefixed, Delimited])
    def test_max_length(self, make: Callable[..., Any]) -> None:
        name = make().__class__.__name__
        for number in (0, -1):
            with pytest.raises(
                ConfigurationError, match=f"^{name}: max_length must be at least 1 byte, not {number}$"
            ):
                make(max_length=number)
        for value in ("10", 1.5, True):
            words = f"^{name}: max_length must be a whole number of bytes, not {value!r}$"
            with pytest.raises(TypeError, match=words):
                make(max_length=value)

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: LengthPrefixed(5), "LengthPrefixed: header must be 1, 2, 3, 4 or 8 bytes, not 5"),
            (
                lambda: LengthPrefixed(byteorder="network"),  # type: ignore[arg-type]
                "LengthPrefixed: byteorder is 'big' or 'little', not 'network'",
            ),
            (lambda: Delimited(b""), "Delimited: delimiter must not be empty"),
            (
                lambda: Delimited(b"ab", start=b"xab"),
                "Delimited: start b'xab' must neither hold b'ab' nor end with its beginning",
            ),
            (
                lambda: Delimited(b"ab", start=b"xa"),
                "Delimited: start b'xa' must neither hold b'ab' nor end with its beginning",
            ),
            (
                lambda: Lines(newline="\r"),  # type: ignore[arg-type]
                r"Lines: newline must be '\n' or '\r\n', not '\r'; for another end use Delimited",
            ),
            (lambda: Lines("klingon"), "Lines: 'klingon' is not a text encoding that Python knows"),
            (lambda: Lines("hex"), "Lines: 'hex' is not a text encoding that Python knows"),
        ],
    )
    def test_a_useless_value_is_a_configuration_error(self, make: Callable[[], Any], words: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            make()
        assert isinstance(caught.value, ValueError)
        assert str(caught.value) == words

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7", "cp037"])
    def test_an_encoding_without_plain_newlines(self, encoding: str) -> None:
        words = "does not hold ASCII unchanged, so a newline is no byte of its own"
        with pytest.raises(ConfigurationError, match=f"^Lines: encoding '{encoding}' {words}$"):
            Lines(encoding)

    @pytest.mark.parametrize("encoding", ["raw_unicode_escape", "unicode_escape", "hz", "idna", "punycode"])
    def test_an_encoding_that_could_smuggle_a_newline_into_a_line(self, encoding: str) -> None:
        with pytest.raises(ConfigurationError):
            Lines(encoding)

    @pytest.mark.parametrize(
        "encoding", ["UTF8", "ascii", "latin-1", "cp1252", "shift_jis", "gb18030", "big5"]
    )
    def test_an_encoding_that_contains_ascii(self, encoding: str) -> None:
        assert Lines(encoding).encode("hello") == b"hello\n"

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: LengthPrefixed("4"), "LengthPrefixed: header must be a whole number of bytes, not '4'"),  # type: ignore[arg-type]
            (
                lambda: LengthPrefixed(True),
                "LengthPrefixed: header must be a whole number of bytes, not True",
            ),
            (lambda: Delimited("\n"), "Delimited: delimiter must be bytes, not str"),  # type: ignore[arg-type]
            (lambda: Delimited(start="<"), "Delimited: start must be bytes, not str"),  # type: ignore[arg-type]
            (lambda: Lines(5), "Lines: encoding must be str, not int"),  # type: ignore[arg-type]
        ],
    )
    def test_a_wrong_type_is_a_type_error(self, make: Callable[[], Any], words: str) -> None:
        with pytest.raises(TypeError) as caught:
            make()
        assert str(caught.value) == words


class Counted(bytearray):
    """Held bytes that count how many of them are looked at or copied."""

    work = 0

    def __iadd__(self, more: Any) -> Any:  # type: ignore[misc]
        self.work += len(more)
        return super().__iadd__(more)

    def find(self, sub: Any, start: Any = 0, end: Any = None) -> int:
        self.work += len(self) - start
        return super().find(sub, start)

    def __bytes__(self) -> bytes:
        self.work += len(self)
        return bytes(memoryview(self))


class TestCost:
    @pytest.mark.parametrize(
        ("make", "size"),
        [
            (lambda: Lines(), 200_000),
            (lambda: Lines(), 3),
            (lambda: Delimited(b"--boundary--", start=b"<"), 200_000),
            (lambda: LengthPrefixed(), 200_000),
            (lambda: LengthPrefixed(), 3),
        ],
    )
    def test_of_one_byte_chunks_grows_with_the_bytes_only(self, make: Callable[[], Any], size: int) -> None:
        codec = make()
        held = codec._held = Counted()
        message: Any = "x" * size if isinstance(codec, Lines) else b"x" * size
        wire = codec.encode(message)
        messages: list[Any] = []
        for byte in wire:
            messages += codec.decode(bytes([byte]))
        assert messages == [message]
        assert len(wire) <= held.work <= 15 * len(wire)

    def test_of_whole_messages_in_one_chunk_is_no_copy_into_the_held_bytes(self) -> None:
        for codec in (Lines(), Delimited(), LengthPrefixed(1)):
            held = codec._held = Counted()
            wire = codec.encode("x" if isinstance(codec, Lines) else b"x")  # type: ignore[arg-type]
            assert len(list(codec.decode(wire * 100))) == 100
            assert held.work == 0


class TestThreads:
    @framed
    @quickly
    @given(data=garbage, message=st.none() | texts | blobs)
    def test_encode_touches_nothing_that_decode_holds(
        self, make: Callable[[], Any], data: bytes, message: Any
    ) -> None:
        codec = make()
        collect(lambda: codec.decode(data))
        before = state_of(codec)
        with contextlib.suppress(TypeError, ValueError):
            codec.encode(message)
        assert state_of(codec) == before

    @pytest.mark.parametrize("make", [Lines, LengthPrefixed, lambda: Delimited(b"\x1c\r", start=b"\x0b")])
    def test_many_senders_and_the_coordinator_on_one_codec(self, make: Callable[[], Any]) -> None:
        codec = make()
        texts = ["".join(chr(97 + (n + k) % 26) for k in range(n % 50)) for n in range(300)]
        messages: list[Any] = [text if isinstance(codec, Lines) else text.encode() for text in texts]
        wire = b"".join(make().encode(message) for message in messages)
        started = threading.Barrier(4)
        interval = sys.getswitchinterval()

        def send() -> list[bytes]:
            started.wait(timeout=10)
            return [codec.encode(message) for message in messages]

        def receive() -> list[Any]:
            started.wait(timeout=10)
            return [message for byte in wire for message in codec.decode(bytes([byte]))]

        sys.setswitchinterval(1e-6)
        try:
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                senders = [pool.submit(send) for _ in range(3)]
                received = pool.submit(receive).result()
        finally:
            sys.setswitchinterval(interval)
        assert received == messages
        assert [b"".join(sender.result()) for sender in senders] == [wire] * 3


class TestProtocol:
    def test_a_class_with_the_three_methods_is_a_codec(self) -> None:
        class Ints:
            def decode(self, data: bytes) -> Iterator[int]:
                yield from data

            def encode(self, message: int) -> bytes:
                return bytes([message])

            def eof(self) -> list[int]:
                return []

        codec: Codec[int] = Ints()
        assert isinstance(codec, Codec)
        assert not isinstance(object(), Codec)

    def test_a_subclass_may_leave_out_eof_but_nothing_else(self) -> None:
        class Ints(Codec[int]):
            def decode(self, data: bytes) -> Iterator[int]:
                yield from data

            def encode(self, message: int) -> bytes:
                return bytes([message])

        assert list(Ints().eof()) == []

        class Mute(Codec[int]):
            def decode(self, data: bytes) -> Iterator[int]:
                yield from data

        with pytest.raises(TypeError, match="encode"):
            Mute()  # type: ignore[abstract]

    def test_the_types_of_messages_are_known_to_a_type_checker(self) -> None:
        lines: Codec[str] = Lines()
        others: list[Codec[bytes]] = [Raw(), LengthPrefixed(), Delimited()]
        assert [*lines.decode(b"a\n")] == ["a"]
        assert [*others[0].decode(b"a")] == [b"a"]


def test_a_limit_of_one_byte_is_a_limit() -> None:
    codec = Delimited(max_length=1)
    assert list(codec.decode(codec.encode(b"a"))) == [b"a"]
    with pytest.raises(ValueError, match="limit is 1 bytes"):
        codec.encode(b"ab")
    with pytest.raises(MessageTooLarge):
        list(codec.decode(b"ab\n"))
