"""The tokenizer that travels in an exported folder, in files that both we and ``transformers`` read."""

import shutil
from pathlib import Path
from typing import Any

from ssm_jax.errors import LayoutError
from ssm_jax.interop.folder import read_json, write_json

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "chat_template.jinja",
    "ssm_tokenizer.json",
)
_END_OF_TEXT = "<|endoftext|>"
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def write(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer into ``folder``: None writes nothing, a path copies its files, an object saves itself.

    Raises:
        LayoutError: a path without any tokenizer file.
    """
    if tokenizer is None:
        return
    if isinstance(tokenizer, (str, Path)):
        found = [Path(tokenizer) / name for name in FILES if (Path(tokenizer) / name).is_file()]
        if not found:
            raise LayoutError(f"Folder {tokenizer} holds no tokenizer files; pass the folder of a tokenizer.")
        for file in found:
            shutil.copy(file, folder)
        return
    tokenizer.save(folder)
    if tokenizer.kind == "bytes":
        _write_bytes(folder, tokenizer.eos_id)


def special_tokens(tokenizer: Any) -> dict[str, int | None]:
    """Ids for ``config.json``: the end of text in every role, or None where no tokenizer says."""
    return dict.fromkeys(_SPECIAL, getattr(tokenizer, "eos_id", None))


def special_tokens_of(folder: Path) -> dict[str, Any]:
    """The ids that a folder's own config.json or generation_config.json states."""
    content: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            content |= read_json(folder / name)
    return {key: content.get(key) for key in _SPECIAL}


def _write_bytes(folder: Path, eos_id: int) -> None:
    """Raw bytes in the ``tokenizers`` format: a byte-level BPE without merges, each byte's id its value."""
    import tokenizers

    model = tokenizers.models.BPE(vocab={character: byte for byte, character in _byte_characters().items()}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([_END_OF_TEXT])
    assert tokenizer.token_to_id(_END_OF_TEXT) == eos_id
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), _END_OF_TEXT),
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a special token spelled out in a text is text
        "model_max_length": 10**30,
    }
    write_json(folder / "tokenizer_config.json", config)


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level vocabularies.

    Visible Latin-1 characters stand for themselves; the other bytes, in order, for the characters from U+0100 on.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(others)}
