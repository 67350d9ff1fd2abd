"""The two buffers that every published RetNet stores: the angles of its rotation and the decays of its heads."""

from collections.abc import Mapping

import numpy as np

from ssm_jax.errors import LayoutError
from ssm_jax.interop.tensor import Tensor
from ssm_jax.nn.mixers.retention import DecayRule, log_decays
from ssm_jax.nn.rotary import geometric_to_end

ANGLE, DECAY = "retnet_rel_pos.angle", "retnet_rel_pos.decay"
_RULES: tuple[DecayRule, ...] = ("powers", "log_spaced")
_ROUNDING = {"float64": 1e-6, "float32": 1e-6, "float16": 1e-3, "bfloat16": 4e-3}
"""Type of a stored number -> how far rounding may have moved it, relative to it."""
_ABSOLUTE = 1e-7
"""How far the originals' own arithmetic may: in float32 1 - 2^-25 is 1, and its logarithm 0."""


def buffers(heads: int, key_dim: int, rule: DecayRule = "powers") -> dict[str, np.ndarray]:
    """Name -> values: radians per position, each twice, and log gamma."""
    angles = np.repeat(geometric_to_end(key_dim, 10_000.0), 2)
    return {ANGLE: angles.astype(np.float32), DECAY: log_decays(rule, heads).astype(np.float32)}


def decay_rule(tensors: Mapping[str, Tensor], default: DecayRule) -> DecayRule:
    """The rule that stored decays follow; ``default`` where none are stored.

    Raises:
        LayoutError: they follow none that ssm_jax has.
    """
    if DECAY not in tensors:
        return default
    stored = np.asarray(tensors[DECAY].load(), np.float64)
    rounding = _ROUNDING.get(str(tensors[DECAY].dtype), 1e-6)
    for rule in _RULES:
        if stored.ndim == 1 and np.allclose(stored, log_decays(rule, len(stored)), rtol=rounding, atol=_ABSOLUTE):
            return rule
    gammas = ", ".join(f"{gamma:.6g}" for gamma in np.exp(stored).ravel()[:4])
    raise LayoutError(f"the stored decays ({gammas}, ...) follow neither 1 - 2^(-5-h) nor syncdoth's use_lm_decay.")
