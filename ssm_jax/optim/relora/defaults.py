"""Which projections of each family get a low-rank path, and why.

The rule is the reference's: the large matrices that mix channels, and nothing else. Embedding and head, norms, biases,
convolutions, decays, step sizes and state-space parameters are small or act on each channel alone, and are trained in full. So
are matrices of low rank already (step sizes of Mamba, bottlenecks of gates) and those with a narrow side, as wide as a recurrent
state or as the number of heads: an adapter would be as large as they are.
"""

import re
from collections.abc import Callable
from typing import Any

from ssm_jax.errors import ConfigError
from ssm_jax.models.registry import family_name
from ssm_jax.optim.relora.spec import Kernel

_LAYER = r"^layers/((units|rest)/)?(members_\d+/)?"
_MIXER = _LAYER + r"(mixer|mamba)/"

_HEADS_IN = Kernel(_MIXER + r"(q|k|v|g)_proj/kernel$", (0,), (1,), (2, 3))
_HEADS_OUT = Kernel(_MIXER + r"out_proj/kernel$", (0,), (1, 2), (3,))
_MLP = Kernel(_LAYER + r"mlp/(gate|up|down)_proj/kernel$", (0,), (1,), (2,))
_IN_HALVES = Kernel(_MIXER + r"in_proj/kernel$", (0,), (1,), (2, 3))
_OUT = Kernel(_MIXER + r"out_proj/kernel$", (0,), (1,), (2,))
_FUSED = Kernel(_MIXER + r"(k|v)_fusion/source_\d+/kernel$", (0,), (1, 2), (3, 4))
_GATED = Kernel(_MIXER + r"(u|v|gate)_proj/kernel$", (0,), (1,), (2,))
_GATES = Kernel(_LAYER + r"(mixer|mlp|step)_gate/kernel$", (0,), (1,), (2,))
_STEP = Kernel(_LAYER + r"step/proj/kernel$", (0,), (1, 2), (3,))

_ATTENTION = (_HEADS_IN, _HEADS_OUT, _MLP)
KERNELS: dict[str, tuple[Kernel, ...]] = {
    "mamba": (_IN_HALVES, _OUT),
    "mamba2": (_IN_HALVES, _OUT),
    "dense_mamba": (_IN_HALVES, _OUT),
    "gss": (_GATED, _OUT, *_ATTENTION),
    "retnet": _ATTENTION,
    "dense_retnet": (*_ATTENTION, _FUSED),
    "baka": (*_ATTENTION, _IN_HALVES, _OUT, _GATES, _STEP),
    "gpt2": _ATTENTION,
    "gpt_neox": _ATTENTION,
    "llama": _ATTENTION,
}
"""By family. Of several entries that find a path the one with the leaf's number of axes counts."""

WHY: dict[str, str] = {
    "mamba": "in_proj, whose halves x and z share A, and out_proj: 6 D^2 of a layer's parameters; dt, B and C are narrow.",
    "mamba2": "as mamba: in_proj and out_proj; B, C and dt are as narrow as the state and the heads.",
    "dense_mamba": "as mamba; the matrices over a channel's state are N x N, the gates bottlenecks.",
    "gss": "u, v, gate and output projections, 2 D F + D H + H F of a layer; in a hybrid also attention and perceptron.",
    "retnet": "q, k, v, gate and output projections, as attention's, and the perceptron.",
    "dense_retnet": "as retnet, and the matrices over all heads that fused keys and values go through; gates are bottlenecks.",
    "baka": "attention and perceptron, the D x D gates around them, the step over four slots, and Mamba's in_proj and out_proj; "
    "a step that all layers share is used by hand, and so are pauses and memory: they are trained in full.",
    "gpt2": "q, k, v, output projection and the perceptron, as in the reference.",
    "gpt_neox": "q, k, v, output projection and the perceptron, as in the reference.",
    "llama": "q, k, v, output projection and the gated perceptron: exactly what the reference wraps.",
}


def defaults(config: Any, narrow: tuple[str, ...] = ()) -> Callable[[str, Any], Kernel | None]:
    """``split(params, defaults(model.config), ...)``: the kernels of a family's model, stacked layers as a batch axis; with
    ``narrow``, those whose path one of these patterns finds.

    Raises:
        ConfigError: a config of no family.
    """
    return selection(KERNELS[family_name(config)], narrow)


def selection(kernels: tuple[Kernel, ...], narrow: tuple[str, ...] = ()) -> Callable[[str, Any], Kernel | None]:
    """A select function out of alternatives: a leaf takes the first entry whose pattern finds it and whose axes are its own.

    ``narrow``: patterns of which one must find the path too; empty for no such condition.
    """

    def select(path: str, leaf: Any) -> Kernel | None:
        if narrow and not any(_finds(pattern, path) for pattern in narrow):
            return None
        fitting = (k for k in kernels if re.search(k.pattern, path) and k.axes(leaf.ndim) is not None)
        return next(fitting, None)

    return select


def _finds(pattern: str, path: str) -> bool:
    try:
        return re.search(pattern, path) is not None
    except re.error as error:
        raise ConfigError(f"ReLoRA's selection: {pattern!r} is not a regular expression ({error}).") from error
