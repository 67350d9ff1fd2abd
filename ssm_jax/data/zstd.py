"""Reading ``.zst`` files with the ``zstandard`` package, several frames in a row included, a missing end noticed."""

import io
from pathlib import Path
from typing import Any

_BLOCK = 1 << 18


def open_zstd(zstandard: Any, path: Path) -> io.BufferedReader:
    """A readable stream of the decompressed bytes. Raises EOFError for a file cut off, ValueError for a damaged one."""
    return io.BufferedReader(_Stream(zstandard, path.open("rb")), _BLOCK)


class _Stream(io.RawIOBase):
    def __init__(self, zstandard: Any, file: io.BufferedReader):
        self._zstandard, self._file = zstandard, file
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._file.read(_BLOCK)
            if not block:
                if self._frame is not None:
                    raise EOFError("it ends inside a zstd frame")
                return 0
            self._decompress(block)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, block: bytes) -> None:
        parts = []
        while block:
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                parts.append(self._frame.decompress(block))
            except self._zstandard.ZstdError as error:
                raise ValueError(str(error)) from error
            block = b""
            if self._frame.eof:
                block, self._frame = self._frame.unused_data, None
        self._ready = memoryview(b"".join(parts))
