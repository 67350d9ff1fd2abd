"""The report in every exported folder: what it holds, and how far PyTorch's logits are from ours."""

import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ssm_jax.errors import LayoutError
from ssm_jax.interop.layouts import Layout
from ssm_jax.interop.tensor_map import published_shapes
from ssm_jax.models import LanguageModel, build, registry
from ssm_jax.typing import Params

REPORT = "parity.json"
_CHECKED_BY_DEFAULT = 200_000_000
_LENGTH = 33
_TOLERANCE = 1e-3


def report(
    folder: Path, layout: Layout, model: LanguageModel, params: Params, files: list[str], check: bool | None
) -> dict[str, Any]:
    """The content of ``parity.json`` for a folder that has just been written.

    Raises:
        LayoutError: PyTorch does not load the folder completely, or its logits are not ours.
    """
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {
        "layout": layout.name,
        "family": layout.family,
        "parameters": parameters,
        "files": files,
        "tensors": _shapes(layout, model, params),
        "logits": _compare(folder, layout, model, params, _wanted(layout, parameters, check)),
    }


def _shapes(layout: Layout, model: LanguageModel, params: Params) -> dict[str, list[int]]:
    shapes = {name: list(shape) for name, shape in published_shapes(layout.tensors_of(model.config), params).items()}
    if layout.stores_tied_head and model.config.tie_embeddings:
        shapes[layout.head] = shapes[layout.embedding]
    return {layout.spelling(model.config, name): shape for name, shape in shapes.items()}


def _wanted(layout: Layout, parameters: int, check: bool | None) -> str | None:
    """None to compare, or the reason not to. Raises LayoutError if a check was asked for and cannot be made."""
    if check is False:
        return "not asked for"
    if layout.torch_logits is None:
        reason = layout.unchecked
    elif not all(importlib.util.find_spec(name) for name in layout.packages):
        reason = f"{' and '.join(layout.packages)} are not installed"
    elif check is None and parameters >= _CHECKED_BY_DEFAULT:
        return "a large model; ask for it with check=True (--check)"
    else:
        return None
    if check:
        raise LayoutError(f"The layout {layout.name!r} cannot be checked here: {reason}; leave out the check.")
    return reason


def _compare(folder: Path, layout: Layout, model: LanguageModel, params: Params, reason: str | None) -> dict[str, Any]:
    if reason:
        return {"compared": False, "reason": reason}
    assert layout.torch_logits is not None
    limit = registry.family_of(model.config).context_limit(model.config) or _LENGTH
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, min(_LENGTH, limit)), dtype=np.int32)
    theirs = layout.torch_logits(folder, tokens)
    float32 = build(model.config, dtype="float32")
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(jax.jit(lambda p, t: float32.apply({"params": p}, t)[0])(params, tokens))
    difference, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    if not difference <= _TOLERANCE * max(1.0, largest):
        raise LayoutError(
            f"PyTorch's logits differ from ours by {difference:.2g} (largest logit {largest:.2g}), so nothing was written; "
            "please report this with the model's config."
        )
    return {
        "compared": True,
        "with": ", ".join(f"{name} {metadata.version(name)}" for name in layout.packages),
        "tokens": list(tokens.shape),
        "largest_logit": largest,
        "largest_difference": difference,
    }
