import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from ssm_jax.data.tokenizers import ByteTokenizer, SubwordTokenizer, TextStream, load_tokenizer
from ssm_jax.errors import DataError

TEXT = "the theory <|endoftext|> of  naïve 日本 🙂\n\tthe end"


@given(st.text())
def test_bytes_round_trip(text: str):
    ids = ByteTokenizer().encode(text)
    assert ids.tolist() == list(text.encode())
    assert ids.dtype == np.int32
    assert ByteTokenizer().decode(ids) == text


def test_bytes_takes_any_bytes_and_skips_the_end_mark():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(b"\xff\x00").tolist() == [255, 0]
    assert tokenizer.decode([tokenizer.eos_id, 97, 255, 98, 300]) == "a\ufffdb"


def test_gpt2_merges_and_round_trip(gpt2_folder: Path):
    tokenizer = load_tokenizer(gpt2_folder)
    assert tokenizer.encode("the the").tolist() == [257, 258]
    assert tokenizer.vocab_size == 260
    assert tokenizer.eos_id == 259
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode(TEXT.encode()).tolist() == tokenizer.encode(TEXT).tolist()


def test_special_tokens_in_text_are_text(gpt2_folder: Path):
    tokenizer = load_tokenizer(gpt2_folder)
    assert tokenizer.eos_id not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.decode([tokenizer.eos_id, *tokenizer.encode("ab"), tokenizer.eos_id]) == "ab"


@pytest.mark.torch
def test_gpt2_matches_transformers(gpt2_folder: Path):
    import transformers

    theirs = transformers.GPT2Tokenizer(str(gpt2_folder / "encoder.json"), str(gpt2_folder / "vocab.bpe"))
    text = TEXT.replace("<|endoftext|>", "")
    assert load_tokenizer(gpt2_folder).encode(text).tolist() == theirs(text).input_ids


@pytest.mark.parametrize("kind", ["bytes", "subword"])
def test_saved_tokenizer_is_the_same(kind: str, gpt2_folder: Path, tmp_path: Path):
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else gpt2_folder)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(folder)
    assert load_tokenizer(folder).fingerprint == tokenizer.fingerprint
    loaded = load_tokenizer(tmp_path)
    assert loaded.kind == kind
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


def test_saved_subword_tokenizer_serves_as_hugging_face_folder(gpt2_folder: Path, tmp_path: Path):
    tokenizer = load_tokenizer(gpt2_folder)
    tokenizer.save(tmp_path)
    (tmp_path / "ssm_tokenizer.json").unlink()
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint == tokenizer.fingerprint


def test_fingerprint_sees_every_change(gpt2_folder: Path, tmp_path: Path):
    tokenizer = load_tokenizer(gpt2_folder)
    tokenizer.save(tmp_path)
    model = (tmp_path / "tokenizer.json").read_text()
    assert SubwordTokenizer(json.dumps(json.loads(model), indent=7), 259).fingerprint == tokenizer.fingerprint
    assert SubwordTokenizer(model, 0).fingerprint != tokenizer.fingerprint
    content = json.loads(model)
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="fingerprint"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["bytes", "subword"])
@given(text=st.text(), cuts=st.lists(st.integers(0, 60)))
def test_stream_equals_decode(kind: str, text: str, cuts: list[int], gpt2_folder: Path):
    tokenizer = ByteTokenizer() if kind == "bytes" else load_tokenizer(gpt2_folder)
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.push(part) for part in np.split(ids, sorted(cuts))]
    assert "".join(pieces) + stream.finish() == text
    assert stream.finish() == ""


def test_stream_holds_back_incomplete_characters():
    stream = TextStream(ByteTokenizer())
    first, second, third, fourth = "🙂".encode()
    assert stream.push([97, first]) == ""
    assert stream.push([second, third]) == ""
    assert stream.push([fourth]) == "a🙂"
    assert stream.push([first]) == ""
    assert stream.finish() == "\ufffd"


def test_missing_and_unknown_tokenizers(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere does not exist.*'bytes'"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no tokenizer.*tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(DataError, match=r"tokenizer\.model cannot be read \(it is no SentencePiece model\)"):
        load_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(DataError, match=r"nobody/nothing-here is no file here, and cannot be fetched from the hub"):
        load_tokenizer("nobody/nothing-here")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"config\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "config.json")
    (tmp_path / "half.json").write_text('{"model": ')
    with pytest.raises(DataError, match=r"half\.json cannot be read"):
        load_tokenizer(tmp_path / "half.json")
    (tmp_path / "wrong.json").write_text('{"model": 3, "added_tokens": [{"content": "</s>", "id": 0}]}')
    with pytest.raises(DataError, match=r"wrong\.json cannot be read"):
        load_tokenizer(tmp_path / "wrong.json")


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 120 pieces, bytes included."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the theory of the naïve end", "another line of text"] * 20),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder / "tokenizer.model"


def test_sentencepiece_is_the_package_itself(sentencepiece_file: Path, tmp_path: Path):
    tokenizer = load_tokenizer(sentencepiece_file)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    assert tokenizer.vocab_size == reference.vocab_size()
    assert tokenizer.eos_id == reference.eos_id()
    for text in ("the theory", "", "日本 🙂 <s>", "the  end"):
        assert tokenizer.encode(text).tolist() == reference.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(reference.encode(text))
    assert tokenizer.decode([tokenizer.eos_id, *tokenizer.encode("the end").tolist(), 10**6]) == "the end"
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.fingerprint, again.kind) == (tokenizer.fingerprint, "sentencepiece")
    other = load_tokenizer(sentencepiece_file, eos_token="<s>")
    assert other.eos_id == reference.bos_id()
    assert other.fingerprint != tokenizer.fingerprint
    with pytest.raises(DataError, match=r"is no control token, so text could spell it"):
        load_tokenizer(sentencepiece_file, eos_token="e")
    with pytest.raises(DataError, match=r"has no token '<eot>'.*--eos-token"):
        load_tokenizer(sentencepiece_file, eos_token="<eot>")


def test_sentencepiece_streams_what_it_decodes(sentencepiece_file: Path):
    tokenizer = load_tokenizer(sentencepiece_file)
    ids = tokenizer.encode("the naïve 🙂 end of text").tolist()
    stream = TextStream(tokenizer)
    assert "".join([*(stream.push([token]) for token in ids), stream.finish()]) == tokenizer.decode(ids)


def test_merges_that_do_not_fit_the_vocabulary(gpt2_folder: Path, tmp_path: Path):
    shutil.copy(gpt2_folder / "encoder.json", tmp_path)
    (tmp_path / "vocab.bpe").write_text("x y\n")
    with pytest.raises(DataError, match=r"vocab\.bpe does not fit encoder\.json"):
        load_tokenizer(tmp_path)


def test_end_of_text_token_by_name_and_by_config(gpt2_folder: Path, tmp_path: Path):
    load_tokenizer(gpt2_folder).save(tmp_path)
    model = (tmp_path / "tokenizer.json").read_text().replace("<|endoftext|>", "<stop>")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "tokenizer.json").write_text(model)
    with pytest.raises(DataError, match=r"no end-of-text token.*--eos-token \('<stop>'\)"):
        load_tokenizer(plain)
    with pytest.raises(DataError, match="no token '<end>'"):
        load_tokenizer(plain, eos_token="<end>")
    assert load_tokenizer(plain, eos_token="<stop>").eos_id == 259
    (plain / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    assert load_tokenizer(plain).eos_id == 259


def test_damaged_description(tmp_path: Path):
    (tmp_path / "ssm_tokenizer.json").write_text('{"kind": "bytes"}')
    with pytest.raises(DataError, match="damaged"):
        load_tokenizer(tmp_path)
    (tmp_path / "ssm_tokenizer.json").write_text('{"kind": "runes", "eos_id": 1, "fingerprint": ""}')
    with pytest.raises(DataError, match="'runes'"):
        load_tokenizer(tmp_path)


def test_text_without_utf8_form(gpt2_folder: Path):
    with pytest.raises(DataError, match="lone surrogate at character 1"):
        ByteTokenizer().encode("a\ud800")
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 1\)"):
        load_tokenizer(gpt2_folder).encode(b"a\xff")
