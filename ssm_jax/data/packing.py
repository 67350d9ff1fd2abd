"""Packing documents into rows of fixed length, and the rows' record format.

A document becomes ``[eos] + tokens + [eos]``. The first mark is the document's position 0, so that its first real token is
predicted too; the last one teaches where text ends. Documents are laid end to end and cut every ``seq_len`` tokens, so no
token is lost and only the last row of a split has absent places. A row starts with a fresh state: positions count from 0 at
each document start and at each row start.

The target of a token is the token after it in its document, also where that lies in the next row. A document's last token has
no target: weight 0. Absent places (the end of the last row) have position -1 and weight 0. Tokens and targets are 0 where they
mean nothing, so they are always valid ids.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Integer

from ssm_jax.errors import DataError

Row = dict[str, np.ndarray]
"""tokens, targets, positions int32 and weights float32, each [L]; with a leading B in a batch."""

_HEADER = struct.Struct("<III")  # checksum, number of pieces, 1 if the last piece goes on in the next row


@dataclass(frozen=True)
class PackedRow:
    """A row before its places are spelled out.

    Attributes:
        tokens: the row's tokens, then one more if the last piece goes on in the next row: its last target.
        lengths: number of tokens of each piece (a document, or the part of one that lies in this row).
        continues: whether the last piece goes on in the next row.
    """

    tokens: Integer[np.ndarray, "n"]
    lengths: Integer[np.ndarray, "pieces"]
    continues: bool


def frame_document(tokens: Int32[np.ndarray, "n"], eos_id: int) -> Int32[np.ndarray, "m"]:
    """``[eos] + tokens + [eos]``."""
    framed = np.full(len(tokens) + 2, eos_id, np.int32)
    framed[1:-1] = tokens
    return framed


def pack(documents: Iterable[np.ndarray], seq_len: int) -> Iterator[PackedRow]:
    """Cuts the concatenation of ``documents`` (framed token arrays) into rows of ``seq_len`` tokens, the last one shorter."""
    pieces: list[np.ndarray] = []
    room = seq_len
    for document in documents:
        start = 0
        while start < len(document):
            piece = document[start : start + room]
            pieces.append(piece)
            start += len(piece)
            room -= len(piece)
            if room == 0:
                yield _row(pieces, following=document[start : start + 1])
                pieces, room = [], seq_len
    if pieces:
        yield _row(pieces, following=pieces[-1][:0])


def _row(pieces: list[np.ndarray], following: np.ndarray) -> PackedRow:
    lengths = np.array([len(piece) for piece in pieces], np.uint32)
    return PackedRow(np.concatenate([*pieces, following]), lengths, len(following) == 1)


def expand(row: PackedRow, seq_len: int) -> Row:
    """The arrays of a batch row, each [seq_len]."""
    lengths = row.lengths.astype(np.int64)
    ends = np.cumsum(lengths)
    n = int(ends[-1])
    tokens, targets, positions = (np.full(seq_len, fill, np.int32) for fill in (0, 0, -1))
    weights = np.zeros(seq_len, np.float32)
    tokens[:n] = row.tokens[:n]
    targets[: len(row.tokens) - 1] = row.tokens[1:]
    positions[:n] = np.arange(n) - np.repeat(ends - lengths, lengths)
    weights[:n] = 1
    last = ends[:-1] - 1 if row.continues else ends - 1
    targets[last] = 0
    weights[last] = 0
    return {"tokens": tokens, "targets": targets, "positions": positions, "weights": weights}


def absent_row(seq_len: int) -> Row:
    """A row without tokens: every position -1, every weight 0. It fills an incomplete batch."""
    tokens, targets, positions = (np.full(seq_len, fill, np.int32) for fill in (0, 0, -1))
    return {"tokens": tokens, "targets": targets, "positions": positions, "weights": np.zeros(seq_len, np.float32)}


def encode_record(row: PackedRow, index: int, token_dtype: str) -> bytes:
    """A row as bytes. The CRC32 at its head covers the content and the row's ``index`` in its split."""
    lengths, tokens = row.lengths.astype("<u4"), row.tokens.astype(np.dtype(token_dtype).newbyteorder("<"))
    content = _HEADER.pack(0, len(lengths), row.continues)[4:] + lengths.tobytes() + tokens.tobytes()
    return struct.pack("<I", _checksum(content, index)) + content


def decode_record(record: bytes, index: int, token_dtype: str) -> PackedRow:
    """The inverse of ``encode_record``; raises DataError if the checksum does not fit."""
    if len(record) < _HEADER.size:
        raise DataError(f"it has {len(record)} bytes")
    checksum, pieces, continues = _HEADER.unpack_from(record)
    if checksum != _checksum(memoryview(record)[4:], index):
        raise DataError("its checksum does not fit")
    lengths = np.frombuffer(record, "<u4", pieces, _HEADER.size)
    tokens = np.frombuffer(record, np.dtype(token_dtype).newbyteorder("<"), offset=_HEADER.size + lengths.nbytes)
    return PackedRow(tokens, lengths, bool(continues))


def _checksum(content: bytes | memoryview, index: int) -> int:
    return zlib.crc32(content, zlib.crc32(struct.pack("<Q", index)))
