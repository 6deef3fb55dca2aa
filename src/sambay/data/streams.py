"""Opening plain, gzip and zstd files as streams of their uncompressed bytes."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from sambay.data.sources import GZIP, ZSTD
from sambay.errors import MissingPackage

_BLOCK = 1 << 20


def open_stream(
    path: str, compression: str, on_read: Callable[[int], None] | None = None
) -> BinaryIO:
    """The uncompressed content of a file, as a buffered binary stream.

    `on_read` is told the number of bytes each time some are read from the disk.

    Raises:
        OSError, EOFError, zlib.error: on opening or reading, if the file is missing or damaged.
        MissingPackage: zstandard is needed and not installed.
    """
    file = io.BufferedReader(_CountingFile(path, on_read), _BLOCK)
    try:
        if compression == GZIP:
            return cast(BinaryIO, _GzipFile(file))
        if compression == ZSTD:
            return io.BufferedReader(ZstdReader(file), _BLOCK)
    except MissingPackage:
        file.close()
        raise
    return file


class _CountingFile(io.FileIO):
    """Tells how much has been read, for progress within large files."""

    def __init__(self, path: str, on_read: Callable[[int], None] | None) -> None:
        super().__init__(path, "rb")
        self._on_read = on_read

    def readinto(self, target: Any) -> int:
        count = super().readinto(target) or 0
        if self._on_read:
            self._on_read(count)
        return count


class _GzipFile(gzip.GzipFile):
    """Closes the file below it too."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(fileobj=file)
        self._below = file

    def close(self) -> None:
        super().close()
        self._below.close()


class ZstdReader(io.RawIOBase):
    """Reads all frames of a zstd file and, unlike the package's reader, reports a truncated one."""

    def __init__(self, file: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise MissingPackage("zstandard", "reading .zst files", "data") from error
        self._file = file
        self._error = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            if self._frame is not None and self._frame.eof:
                self._frame = None
            data = data or self._file.read(_BLOCK)
            if not data:
                if self._frame is not None:
                    raise EOFError("the compressed data is truncated")
                return 0
            if self._frame is None:
                self._frame = self._new()
            try:
                self._ready = self._frame.decompress(data)
            except self._error as error:
                raise EOFError(f"the compressed data is damaged ({error})") from error
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
