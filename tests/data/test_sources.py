import gzip
import json
import sys
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from ssm_jax.data import sources
from ssm_jax.data.documents import Document, Dropped, cut_at_character, limit_bytes, read_documents
from ssm_jax.data.sources import find_sources
from ssm_jax.errors import DataError


def read(*inputs: Path | str, skip_bad: bool = False, **options) -> tuple[list[tuple[str, str]], Dropped]:
    dropped = Dropped()
    files = find_sources(inputs, options.pop("include", ()), skip_bad=skip_bad)
    documents = [document for file in files for document in read_documents(file, dropped, **options)]
    return [(document.name, document.text.decode()) for document in documents], dropped


def test_folder_is_read_recursively_sorted_without_hidden_and_other_files(tmp_path: Path):
    root = tmp_path / "root"
    for name in ("b.txt", "a.md", "sub/deep/c.py", ".hidden/d.txt", ".e.txt", "__pycache__/f.py", "g.bin", "sub/h.TXT"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    assert [name for name, _ in read(root)[0]] == ["root/a.md", "root/b.txt", "root/sub/deep/c.py"]
    assert [name for name, _ in read(root, include=["*.bin", "*.md"])[0]] == ["root/a.md", "root/g.bin"]
    assert [name for name, _ in read(root / "g.bin", root / "b.txt")[0]] == ["g.bin", "b.txt"]


def test_text_is_taken_as_it_is(tmp_path: Path):
    text = "\ufeffline\r\nline\u2028 e\u0301 \x0c\n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}))
    assert [content for _, content in read(tmp_path)[0]] == [text] * 3


def test_json_lines(tmp_path: Path):
    lines = '{"text": "one"}\n\n{"text": "", "id": 2}\n{"body": "x", "text": "four"}'
    for name, content in (("x.jsonl", lines.encode()), ("y.jsonl.gz", gzip.compress(lines.encode()))):
        (tmp_path / name).write_bytes(content)
        documents, dropped = read(tmp_path / name)
        assert documents == [(f"{name}:1", "one"), (f"{name}:4", "four")]
        assert dropped == Dropped(empty=1)
    (tmp_path / "z.jsonl").write_text('{"body": "x"}\n')
    assert read(tmp_path / "z.jsonl", text_field="body")[0] == [("z.jsonl:1", "x")]


def test_zstandard_of_several_frames(tmp_path: Path):
    text = "line one\n" * 50_000 + "ü"
    half = len(text) // 2
    frames = b"".join(zstandard.compress(part.encode()) for part in (text[:half], text[half:]))
    (tmp_path / "a.txt.zst").write_bytes(frames)
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "x"}\n{"text": "y"}\n'))
    assert [content for _, content in read(tmp_path)[0]] == [text, "x", "y"]


def test_parquet_rows(tmp_path: Path):
    texts = [f"row {i}" for i in range(2500)] + ["", "last"]
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    documents, dropped = read(tmp_path)
    assert documents[0] == (f"{tmp_path.name}/a.parquet:1", "row 0")
    assert [content for _, content in documents] == [text for text in texts if text]
    assert dropped == Dropped(empty=1)
    bad = pyarrow.array([b"ok", b"\xff\xfe", b"last"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    assert [content for _, content in read(tmp_path, skip_bad=True)[0]] == ["ok", "last"]
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 2, has no text in field 'text'"):
        read(tmp_path)


@pytest.fixture
def local_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in a folder, as the ``datasets`` package finds it; its cache stays in the test's folder."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one", "n": 1}\n{"text": "", "n": 2}\n{"text": "three", "n": 3}\n')
    (folder / "validation.jsonl").write_text('{"text": "four", "n": 4}\n')
    return folder


def test_a_data_set_is_streamed_by_name(local_datasets: Path):
    name = f"hf:{local_datasets}"
    assert read(name) == ([(f"{name}:1", "one"), (f"{name}:3", "three")], Dropped(empty=1))
    assert [text for _, text in read(f"{name}@validation")[0]] == ["four"]
    with pytest.raises(DataError, match=r"record 1, has no text in field 'body' \(its keys: text, n\)"):
        read(name, text_field="body")
    with pytest.raises(
        DataError, match=r"@test cannot be read .*check its name, configuration and split, and the network"
    ):
        read(f"{name}@test")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hf:allenai/c4/en", ("allenai/c4", "en", "train")),
        ("hf:c4@validation", ("allenai/c4", "en", "validation")),
        ("hf:wikitext-103", ("Salesforce/wikitext", "wikitext-103-raw-v1", "train")),
        ("hf:pile", ("monology/pile-uncopyrighted", None, "train")),
    ],
)
def test_names_of_data_sets(given: str, expected: tuple):
    found = sources.parse_hub(given)
    assert (found.path, found.config, found.split) == expected


def test_a_name_that_is_none(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match=r"hf:c44 names no data set; .*hf:c4, hf:pile, hf:wikitext-103"):
        find_sources(["hf:c44"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"hf:c4 needs the package 'datasets'; install it with pip install 'ssm_jax\[data\]'"
    ):
        read("hf:c4")


BAD = {
    "cut.txt.zst": (
        zstandard.compress(b"hello world" * 100)[:-3],
        r"cut\.txt\.zst cannot be read .*ends inside a zstd frame",
    ),
    "plain.txt.zst": (b"no zstandard at all", r"plain\.txt\.zst cannot be read"),
    "plain.parquet": (b"no parquet at all", r"plain\.parquet cannot be read"),
    "empty.txt": (b"", r"empty\.txt is empty"),
    "empty.jsonl": (b"\n \n", r"empty\.jsonl is empty"),
    "binary.txt": (b"ab\0c", r"binary\.txt, looks binary \(NUL at byte 2\)"),
    "latin.txt": ("naïve".encode("latin-1"), r"latin\.txt, is not UTF-8 \(byte 2\)"),
    "cut.txt.gz": (gzip.compress(b"hello world" * 100)[:-12], r"cut\.txt\.gz cannot be read .*end-of-stream"),
    "plain.txt.gz": (b"no gzip", r"plain\.txt\.gz cannot be read \(Not a gzipped file"),
    "field.jsonl": (b'{"text": "a"}\n{"body": "b", "id": 1}\n', r"field\.jsonl, line 2, has no text .*keys: body, id"),
    "deep.jsonl": (b"[" * 100_000, r"deep\.jsonl, line 1, is not JSON"),
    "number.jsonl": (b'{"text": 3}\n', r"number\.jsonl, line 1, has no text in field 'text'"),
    "list.jsonl": (b'["text"]\n', r"list\.jsonl, line 1, .*it is no object"),
    "half.jsonl": (b'{"text": "a"}\n{"text": "b', r"half\.jsonl, line 2, is not JSON"),
    "latin.jsonl": (b'{"text": "\xff"}\n', r"latin\.jsonl, line 1, is not UTF-8"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', r"surrogate\.jsonl, line 1, holds a lone surrogate"),
    "nul.jsonl": (b'{"text": "\\u0000"}\n', r"nul\.jsonl, line 1, looks binary"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_named_or_skipped(name: str, tmp_path: Path):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)
    _, dropped = read(tmp_path / name, skip_bad=True)
    assert dropped.bad == 1
    assert name in dropped.first_bad


def test_skipping_keeps_the_good_lines_of_a_bad_file(tmp_path: Path):
    lines = "".join(f'{{"text": "{i} {"x" * 999}"}}\n' for i in range(500)).encode()
    packed = gzip.compress(lines)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    documents, dropped = read(tmp_path / "cut.jsonl.gz", skip_bad=True)
    assert documents
    assert dropped.bad == 1
    assert f"after {len(documents)} documents" in dropped.first_bad


def test_empty_files_in_a_folder_are_counted(tmp_path: Path):
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "a.py").write_text("x")
    (tmp_path / "b.jsonl").write_text("")
    documents, dropped = read(tmp_path)
    assert len(documents) == 1
    assert dropped.empty == 1


def test_missing_input_and_folder_without_text(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
        find_sources([tmp_path / "nowhere.txt"])
    with pytest.raises(DataError, match="holds no file that matches a text suffix"):
        find_sources([tmp_path])
    with pytest.raises(DataError, match=r"holds no file that matches \*\.rs"):
        find_sources([tmp_path], ["*.rs"])


def test_python_stdlib_has_real_text_and_no_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = sources.python_stdlib_files()
    names = {file.name for file in files}
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= names
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert all(file.skip_bad for file in files)
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"holds no \.py files"):
        sources.python_stdlib_files()


@given(st.text(), st.integers(0, 40))
def test_cut_at_character(text: str, size: int):
    cut = cut_at_character(text.encode(), size)
    assert text.startswith(cut.decode())
    assert size - 3 <= len(cut) <= size or cut == text.encode()


@given(st.lists(st.text(min_size=1)), st.integers(1, 60))
def test_limit_bytes(texts: list[str], limit: int):
    kept = [document.text for document in limit_bytes(iter([Document("", text.encode()) for text in texts]), limit)]
    whole = "".join(texts).encode()
    assert whole.startswith(b"".join(kept))
    assert min(limit - 3, len(whole)) <= sum(map(len, kept)) <= limit
