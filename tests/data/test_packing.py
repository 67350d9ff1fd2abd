import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssm_jax.data.packing import absent_row, decode_record, encode_record, expand, frame_document, pack
from ssm_jax.errors import DataError

EOS = 99
DOCUMENTS = st.lists(st.lists(st.integers(1, 98), max_size=20), max_size=8)


def framed(documents: list[list[int]]) -> list[np.ndarray]:
    return [frame_document(np.array(document, np.int32), EOS) for document in documents]


def packed_one_by_one(documents: list[list[int]], seq_len: int) -> list[dict[str, list[float]]]:
    """The oracle: places one token after the other."""
    rows = []
    places = [
        (document[i], document[i + 1] if i + 1 < len(document) else None, i == 0)
        for document in ([EOS, *tokens, EOS] for tokens in documents)
        for i in range(len(document))
    ]
    for first in range(0, len(places), seq_len):
        row = {"tokens": [], "targets": [], "positions": [], "weights": []}
        for k, (token, target, starts) in enumerate(places[first : first + seq_len]):
            row["tokens"].append(token)
            row["targets"].append(0 if target is None else target)
            row["positions"].append(0 if starts or k == 0 else row["positions"][-1] + 1)
            row["weights"].append(0 if target is None else 1)
        missing = seq_len - len(row["tokens"])
        for name, fill in (("tokens", 0), ("targets", 0), ("positions", -1), ("weights", 0)):
            row[name] += [fill] * missing
        rows.append(row)
    return rows


@given(DOCUMENTS, st.integers(1, 24))
def test_rows_equal_the_oracle(documents: list[list[int]], seq_len: int):
    rows = [expand(row, seq_len) for row in pack(framed(documents), seq_len)]
    assert [{name: array.tolist() for name, array in row.items()} for row in rows] == packed_one_by_one(
        documents, seq_len
    )


@given(DOCUMENTS, st.integers(1, 24))
def test_nothing_is_lost(documents: list[list[int]], seq_len: int):
    rows = [expand(row, seq_len) for row in pack(framed(documents), seq_len)]
    stream = [token for document in framed(documents) for token in document]
    assert [token for row in rows for token in row["tokens"][row["positions"] >= 0]] == stream
    targets = [token for document in framed(documents) for token in document[1:]]
    assert [token for row in rows for token in row["targets"][row["weights"] > 0]] == targets
    assert all((np.diff((row["positions"] < 0).astype(int)) >= 0).all() for row in rows)
    assert all((row["positions"] >= 0).all() for row in rows[:-1])


@given(DOCUMENTS, st.integers(1, 24), st.sampled_from(["uint8", "uint16", "uint32"]))
def test_records_round_trip(documents: list[list[int]], seq_len: int, dtype: str):
    for index, row in enumerate(pack(framed(documents), seq_len)):
        loaded = decode_record(encode_record(row, index, dtype), index, dtype)
        for name, array in expand(row, seq_len).items():
            np.testing.assert_array_equal(expand(loaded, seq_len)[name], array)


def test_types_and_absent_row():
    row = expand(next(pack(framed([[1, 2]]), 8)), 8)
    absent = absent_row(8)
    for name, dtype in (("tokens", np.int32), ("targets", np.int32), ("positions", np.int32), ("weights", np.float32)):
        assert row[name].dtype == absent[name].dtype == dtype
        assert row[name].shape == absent[name].shape == (8,)
    assert (absent["positions"] == -1).all()
    assert (absent["weights"] == 0).all()


def test_every_flipped_bit_of_a_record_is_seen():
    record = encode_record(next(pack(framed([[1, 2, 3], [4]]), 6)), 7, "uint16")
    for bit in range(8 * len(record)):
        damaged = bytearray(record)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DataError):
            decode_record(bytes(damaged), 7, "uint16")
    with pytest.raises(DataError, match="checksum"):
        decode_record(record, 8, "uint16")
    with pytest.raises(DataError, match="5 bytes"):
        decode_record(record[:5], 7, "uint16")
