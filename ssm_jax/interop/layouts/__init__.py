"""The table of layouts. A new format is a new file with a ``Layout`` per family, and its rows here.

The first row of a family that can be written is its most native one: what ``save_pretrained(layout=None)`` writes.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ssm_jax.config import suggest
from ssm_jax.errors import LayoutError
from ssm_jax.interop import native
from ssm_jax.interop.folder import read_json
from ssm_jax.interop.layouts import (
    baka,
    dense_mamba,
    dense_ssm,
    fla,
    gpt2,
    gpt_neox,
    gss,
    llama,
    mamba_ssm,
    mistral,
    retnet,
    transformers,
)
from ssm_jax.interop.layouts.layout import Layout

LAYOUTS: tuple[Layout, ...] = (
    transformers.MAMBA,
    transformers.MAMBA2,
    mamba_ssm.MAMBA,
    mamba_ssm.MAMBA2,
    mistral.MAMBA2,
    gss.PACKAGE,
    gss.PUBLISHED,
    dense_mamba.DENSE_MAMBA,
    baka.BAKALLM,
    baka.CELP18,
    retnet.SYNCDOTH,
    retnet.TORCHSCALE,
    fla.FLA,
    dense_ssm.HUB,
    dense_ssm.GITHUB,
    gpt2.TRANSFORMERS,
    gpt2.OPENAI,
    gpt_neox.TRANSFORMERS,
    llama.TRANSFORMERS,
)


def detect(folder: Path, names: Collection[str]) -> tuple[Layout, dict[str, Any]]:
    """The row that recognises a folder, and the content of its config file. Raises LayoutError when none does."""
    files = [name for name in dict.fromkeys(row.config_file for row in LAYOUTS) if (folder / name).is_file()]
    contents = {name: read_json(folder / name) for name in files}
    for row in LAYOUTS:
        if row.config_file in contents and row.detect(contents[row.config_file], names):
            return row, contents[row.config_file]
    likely = nearest(names)
    if not files:
        look = f" The tensors look like {likely.family} in the layout {likely.name!r}." if likely else ""
        raise LayoutError(
            f"Folder {folder} has no config.json; it is needed beside the weights, with the arguments of the model's class.{look}"
        )
    content = contents[files[0]]
    look = f" Its tensors look like {likely.family} in the layout {likely.name!r}." if likely else ""
    marks = {key: content[key] for key in ("model_type", "architectures", "ssm_cfg") if key in content}
    known = ", ".join(sorted({f"{row.family} in the layout {row.name!r}" for row in LAYOUTS}))
    raise LayoutError(
        f"{folder / files[0]} describes no known model ({marks or 'no model_type'}); ssm_jax reads {known}.{look}"
    )


def nearest(names: Collection[str]) -> Layout | None:
    """The layout of whose first layer most tensors are there, if it is at least half of them."""

    def part(row: Layout) -> float:
        canonical = {row.aliases.get(plain, plain) for plain in map(row.rename, names) if plain is not None}
        wanted = {name.format(i=0) for name in row.tensors if "{i}" in name}
        return len(wanted & canonical) / len(wanted)

    best = max(LAYOUTS, key=part)
    return best if part(best) >= 0.5 else None


def writable(family: str, name: str | None) -> Layout:
    """The row to write a family with: the named one, or the most native one. Raises LayoutError when there is none."""
    rows = {row.name: row for row in LAYOUTS if row.family == family and row.write_files}
    if name is None and rows:
        return next(iter(rows.values()))
    if name not in rows:
        known = name in {row.name for row in LAYOUTS}
        problem = f"cannot hold a {family} model" if known else "is unknown"
        raise LayoutError(f"Layout {name!r} {problem}; {suggest(str(name), [*rows, native.LAYOUT])}")
    return rows[name]


__all__ = ["LAYOUTS", "Layout", "detect", "nearest", "writable"]
