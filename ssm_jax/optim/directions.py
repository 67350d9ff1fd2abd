"""The direction of an update, before weight decay and learning rate: one Optax transformation for each optimizer.

* adamw: m / (sqrt(v) + eps) with bias correction (Loshchilov & Hutter 2019, arXiv:1711.05101).
* lion: sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675); it wants a 3 to 10 times smaller learning rate.
* adafactor: factored second moments, times the parameter's own size (Shazeer & Stern 2018, arXiv:1804.04235); the learning rate
  is relative, 1e-2 is usual.
* muon: orthogonalised momentum for the matrices of the projections, AdamW for everything else (Jordan 2024; Liu et al. 2025,
  arXiv:2502.16982). Scaled to AdamW's typical size, 0.2 per entry, so that AdamW's learning rate and decay carry over.
"""

import math
import re
from typing import Literal

import jax
import optax
from optax import contrib

from ssm_jax.typing import PyTree

Name = Literal["adamw", "lion", "adafactor", "muon"]

MATRICES = (r"(^|/)\w*_proj/kernel$",)
"""What Muon orthogonalises. Not the embedding, the head, convolutions, gates, steps, or the thin factors of a low-rank product."""

_ADAM_RMS = 0.2
_STACK = "layers"


def direction(name: Name, *, beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """gradients -> direction, with the sign of the gradients. Muon's momentum is 0.95; the betas are those of its AdamW part."""
    if name == "adamw":
        return optax.scale_by_adam(beta1, beta2, eps)
    if name == "lion":
        return optax.scale_by_lion(beta1, beta2)
    if name == "adafactor":
        return optax.chain(optax.adafactor(learning_rate=None), optax.scale(-1.0))
    matrices = optax.chain(contrib.scale_by_muon(weight_dimension_numbers=_dimensions), optax.stateless(_like_adam))
    return optax.partition({"matrix": matrices, "other": optax.scale_by_adam(beta1, beta2, eps)}, _labels)


def _labels(params: PyTree) -> PyTree:
    def label(path: tuple, leaf: jax.Array) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return "matrix" if any(re.search(pattern, name) for pattern in MATRICES) else "other"

    return jax.tree.map_with_path(label, params)


def _dimensions(params: PyTree) -> PyTree:
    """A kernel [layers, in, ..., out] is layers x ... matrices [in, out]; attention's out_proj [layers, heads, in, out] too."""

    def axes(path: tuple, leaf: jax.Array) -> contrib.MuonDimensionNumbers:
        return contrib.MuonDimensionNumbers(reduction_axis=_input_axis(path, leaf), output_axis=leaf.ndim - 1)

    return jax.tree.map_with_path(axes, params)


def _like_adam(updates: PyTree, params: PyTree) -> PyTree:
    """An orthogonal [in, out] matrix has entries of mean square 1 / max(in, out)."""
    del params

    def scale(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaf * (_ADAM_RMS * math.sqrt(max(leaf.shape[_input_axis(path, leaf)], leaf.shape[-1])))

    return jax.tree.map_with_path(scale, updates)


def _input_axis(path: tuple, leaf: jax.Array) -> int:
    parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return leaf.ndim - 2 if "out_proj" in parts else int(_STACK in parts)
