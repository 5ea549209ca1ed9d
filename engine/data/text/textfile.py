"""Text files as users have them: compressed or not, with any line ends, and sometimes not UTF-8 text at all."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from engine.errors import UserError

#: the path of the standard input, which is read from where it stands and can't always be opened
STANDARD_INPUT = Path("/dev/stdin")
COMPRESSIONS = (".gz", ".xz", ".bz2")
#: least number of bytes that are read to tell what a file holds
HEAD_BYTES = 4096

_TO_UTF8 = "convert it: iconv -f UTF-16 -t UTF-8 FILE"
#: first bytes of files that are given for text by mistake -> what they are, and the remedy
_OTHER_CONTENT = {
    b"\xff\xfe": ("UTF-16, not UTF-8", _TO_UTF8),
    b"\xfe\xff": ("UTF-16, not UTF-8", _TO_UTF8),
    b"\x1f\x8b": ("compressed by gzip", "end its name in .gz"),
    b"\xfd7zXZ\x00": ("compressed by xz", "end its name in .xz"),
    b"BZh": ("compressed by bzip2", "end its name in .bz2"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd, which is not read", "unpack it first"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet, not text", "unpack it, or save the sheet as CSV in UTF-8"),
    b"PAR1": ("parquet, not text", "end its name in .parquet"),
    b"%PDF-": ("a PDF, not text", "give its text"),
}
#: UTF-16 of Latin letters has a zero byte in every pair
_ZERO_SHARE = 0.2


def _decompressed(raw: IO[bytes], suffix: str) -> IO[bytes]:
    if suffix == ".gz":
        return cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
    if suffix == ".xz":
        return cast("IO[bytes]", lzma.LZMAFile(raw))
    return cast("IO[bytes]", bz2.BZ2File(raw)) if suffix == ".bz2" else raw


def refuse_other_content(head: bytes, path: object) -> None:
    """Raise if a file's first bytes tell that it is no UTF-8 text.

    Raises:
        UserError: says what it is.
    """
    for magic, (what, remedy) in _OTHER_CONTENT.items():
        if head.startswith(magic):
            raise UserError(f"{path}: {what}; {remedy}")
    if head.count(0) > _ZERO_SHARE * len(head):
        raise UserError(f"{path}: UTF-16 or damaged, for it holds zero bytes; {_TO_UTF8}")


def text_lines(path: Path, read: Callable[[int], object] = lambda _: None) -> Iterator[str]:
    """The lines of a possibly compressed UTF-8 file, without a byte order mark at its start.

    Lines end at line feeds; in a file of carriage returns alone, at these.

    Args:
        path: the file, or `STANDARD_INPUT`.
        read: called with each line's position in the file as stored, in bytes; 0 in a pipe.

    Raises:
        UserError: the file is plainly no text file.
        UnicodeDecodeError: the line after the last one is not UTF-8.
        EOFError, OSError, lzma.LZMAError, zlib.error: compressed data is damaged, or the file can't be read.
    """
    encoding = "utf-8-sig"
    with _opened(path) as raw, _decompressed(raw, path.suffix.lower()) as stream:
        head: bytes = cast("Any", stream).peek(HEAD_BYTES)
        refuse_other_content(head, path)
        seekable = raw.seekable()
        lines = _lines_of_any_end(stream) if b"\r" in head and b"\n" not in head else stream
        for line in lines:
            read(raw.tell() if seekable else 0)
            yield line.decode(encoding)
            encoding = "utf-8"


def _opened(path: Path) -> IO[bytes]:
    return open(0, "rb", closefd=False) if path == STANDARD_INPUT else path.open("rb")


def _lines_of_any_end(stream: IO[bytes]) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(1 << 16):
        # The last line is kept back: the next block may begin with the second half of its \r\n.
        *lines, rest = (rest + block).splitlines(keepends=True)
        yield from (line.rstrip(b"\r\n") + b"\n" for line in lines)
    if rest:
        yield rest.rstrip(b"\r\n") + b"\n"


def parse_json(line: str) -> Any:
    """The value of a line of JSON.

    Raises:
        ValueError: what is wrong, in a few words.
    """
    try:
        return json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except json.JSONDecodeError as error:
        if line.strip() in ("[", "{", "[{"):
            raise ValueError("one value over several lines") from error
        raise ValueError(error.msg) from error
    except ValueError as error:  # Python reads integers of up to 4,300 digits
        raise ValueError("a number of too many digits") from error


def without_half_characters(text: str) -> str:
    """A text from JSON without lone surrogates, which JSON can escape: no characters, and UTF-8 can't hold them."""
    return text.encode("utf-8", "ignore").decode()


def json_remedy(line: str) -> str:
    """What to do about a line of JSON that is no object."""
    array = line.lstrip().startswith("[")
    return "write one object a line: jq -c '.[]' FILE" if array else "write one object a line"
