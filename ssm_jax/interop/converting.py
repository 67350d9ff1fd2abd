"""Folder to folder conversion: what ``python -m train.convert`` does."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from ssm_jax.interop import native, parity, tokenizer_files
from ssm_jax.interop.folder import read_json, refuse_existing
from ssm_jax.interop.layouts import writable
from ssm_jax.interop.pretrained import from_pretrained, open_folder, save_pretrained
from ssm_jax.models.registry import family_name


def convert(
    source: str | Path,
    target: str | Path,
    layout: str | None = None,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    check: bool | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Reads ``source`` in whatever layout it is and writes ``target`` in ``layout``, tokenizer and special tokens included.

    Arguments as in ``from_pretrained`` and ``save_pretrained``; ``dtype`` is the type to store. ``say`` receives what was
    read, written and checked, and how to load the result, line by line.
    """
    source, target = Path(source), Path(target)
    refuse_existing(target, overwrite)
    found = native.LAYOUT if native.is_native(source) else open_folder(source).layout.name
    model, params = from_pretrained(source, **({} if dtype is None else {"param_dtype": dtype}))
    family, count = family_name(model.config), sum(leaf.size for leaf in jax.tree.leaves(params))
    say(f"read     {source}: {family}, layout {found}, {count:,} parameters, stored here as {model.config.param_dtype}")
    tokenizer, special = _tokenizer_of(source)
    save_pretrained(
        model, params, target, layout, overwrite=overwrite, tokenizer=tokenizer, special_tokens=special, check=check
    )
    files = ", ".join(sorted(path.name for path in target.iterdir()))
    say(f"written  {target}: layout {layout or writable(family, None).name} ({files})")
    if layout == native.LAYOUT:
        say(f"load it:\n  import ssm_jax\n  model, params = ssm_jax.from_pretrained({str(target)!r})")
        return
    say(f"checked  {_describe(read_json(target / parity.REPORT)['logits'])}")
    snippet = writable(family, layout).load_in_torch.format(path=target)
    say("load it in PyTorch:\n" + "\n".join(f"  {line}" for line in snippet.splitlines()))


def _describe(logits: Mapping[str, Any]) -> str:
    if not logits["compared"]:
        return f"nothing against PyTorch: {logits['reason']}"
    return (
        f"against {logits['with']}: largest logit difference {logits['largest_difference']:.1e}, "
        f"logits up to {logits['largest_logit']:.1f}"
    )


def _tokenizer_of(source: Path) -> tuple[Any, dict[str, Any] | None]:
    """The tokenizer that lies with the weights, if any, and the special token ids that the folder states."""
    if not native.is_native(source):
        here = any((source / name).is_file() for name in tokenizer_files.FILES)
        return (source if here else None), tokenizer_files.special_tokens_of(source)
    from ssm_jax.data.tokenizers import load_tokenizer

    for folder in (source, *source.resolve().parents[:2]):
        if (folder / "tokenizer").is_dir():
            return load_tokenizer(folder / "tokenizer"), None
    return None, None
