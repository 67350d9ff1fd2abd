"""What becomes of the optimizer's memory of the adapters after a merge.

Right after a merge B is zero, and so the gradient of A is exactly zero: an entry of A whose first moment survived while the second
did not would move by m / eps, a million learning rates. So one mask serves all moments of an adapter, except in the forms named
"reference", which repeat the authors' code: a mask for each, and the step counter kept.
"""

import zlib
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ssm_jax.errors import ConfigError
from ssm_jax.optim.config import Reset
from ssm_jax.optim.relora.constants import KEEP_MAGNITUDE, KEEP_RANDOM
from ssm_jax.optim.relora.slots import counters, slots
from ssm_jax.optim.relora.spec import Spec
from ssm_jax.typing import Key, PyTree

METHODS: tuple[str, ...] = get_args(Reset)


def reset_state(
    opt_state: PyTree,
    spec: Spec,
    method: str = "zero",
    *,
    keep: float | None = None,
    key: Key | None = None,
    reset_count: bool | None = None,
) -> PyTree:
    """The state with the adapters' moments pruned, in any Optax chain whose leaves carry the adapters' paths. Pure.

    * zero: nothing is kept, and the adapters' step counter starts again, so that bias correction makes the next step one learning
      rate. It needs a counter of their own: see ``separate_counters``.
    * magnitude: of each adapter (each layer of a stack on its own) the entries are kept whose first moment is, in absolute value,
      strictly above its (1 - keep)-quantile; the second moment at the same entries.
    * random: each entry is kept with probability ``keep``, in all moments or in none.
    * reference, reference_random: the same with a mask for every moment. Only for comparisons: it makes small runs explode.
    * keep: everything stays.

    Args:
        keep: default 0.1 by magnitude, 0.001 at random; neither is for "zero" or "keep". key: of the draw.
        reset_count: whether the counter starts again; default for "zero" alone.

    Raises:
        ConfigError: an unknown method, a share outside [0, 1], no key for a draw, a counter that cannot be reset, no state at all.
    """
    share = check(method, keep)
    if method in ("random", "reference_random") and key is None:
        raise ConfigError(f"Reset {method!r} draws at random; pass key=.")
    owned = slots(opt_state, spec.adapters)
    leaves, treedef = jax.tree.flatten(opt_state)
    if not owned and any(jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim for leaf in leaves):
        raise ConfigError(
            "The optimizer's state holds nothing under the adapters' paths; make it from the trainable tree."
        )
    if method != "keep":
        masks: dict[tuple[str, ...], Bool[Array, ...]] = {}
        for slot in owned:
            leaf, stacked = leaves[slot.index], spec.adapters[slot.param].batch_axes
            if method == "zero":
                leaves[slot.index] = jnp.zeros_like(leaf)
                continue
            shape = _shape(spec, slot.param)
            if leaf.shape != shape:
                raise ConfigError(
                    f"The optimizer keeps {slot.field} of {slot.param} in shape {leaf.shape}, not entry by entry; use reset 'zero'."
                )
            joint = method in ("magnitude", "random")
            place = (slot.owner, slot.param, *(() if joint else (slot.field,)))
            if place not in masks:
                by_size = method in ("magnitude", "reference")
                masks[place] = (
                    largest(leaf, share, stacked) if by_size else _drawn(key, "/".join(place[1:]), share, leaf.shape)
                )
            leaves[slot.index] = jnp.where(masks[place], leaf, jnp.zeros_like(leaf))
    if method == "zero" if reset_count is None else reset_count:
        alone, shared = counters(opt_state, owned)
        if shared:
            raise ConfigError(
                "The adapters share their step counter with other leaves, so that it cannot start again; wrap the direction in "
                "relora.separate_counters(spec, ...), or pass reset_count=False."
            )
        for index in alone:
            leaves[index] = jnp.zeros_like(leaves[index])
    return jax.tree.unflatten(treedef, leaves)


def check(method: str, keep: float | None) -> float:
    """The share that is kept; raises ConfigError for a method or a share that is none."""
    if method not in METHODS:
        raise ConfigError(f"Reset {method!r} is unknown; use {', '.join(METHODS)}.")
    if method in ("zero", "keep"):
        if keep is not None:
            raise ConfigError(
                f"Reset {method!r} keeps what it keeps; leave out the share, or use 'magnitude' or 'random'."
            )
        return float(method == "keep")
    share = (KEEP_RANDOM if "random" in method else KEEP_MAGNITUDE) if keep is None else keep
    if not 0 <= share <= 1:
        raise ConfigError(f"The share of the state that a reset keeps is {share}; it must lie between 0 and 1.")
    return share


def zeroed(opt_state: PyTree, spec: Spec) -> Float[Array, ""]:
    """Share of the adapters' moments that is exactly zero."""
    leaves = jax.tree.leaves(opt_state)
    moments = [leaves[slot.index] for slot in slots(opt_state, spec.adapters)]
    size = sum(leaf.size for leaf in moments)
    zeros = sum((jnp.sum(leaf == 0, dtype=jnp.float32) for leaf in moments), jnp.zeros((), jnp.float32))
    return zeros / max(1, size)


def largest(t: Float[Array, "..."], keep: float, stacked: int = 0) -> Bool[Array, "..."]:
    """Where |t| > quantile(|t|, 1 - keep), strictly: ties at the threshold fall. One threshold for each entry of the leading
    ``stacked`` axes. The quantile interpolates linearly, in float32, and is rounded to t's type."""
    rows = jnp.abs(t).reshape(*t.shape[:stacked], -1)
    threshold = jnp.quantile(rows.astype(jnp.float32), jnp.float32(1.0 - keep), axis=-1, keepdims=True)
    return (rows > threshold.astype(t.dtype)).reshape(t.shape)


def _drawn(key: Key | None, name: str, keep: float, shape: tuple[int, ...]) -> Array:
    assert key is not None
    return jax.random.uniform(jax.random.fold_in(key, zlib.crc32(name.encode())), shape, jnp.float32) > 1.0 - keep


def _shape(spec: Spec, param: str) -> tuple[int, ...]:
    leaf = spec.adapters[param]
    return leaf.a_shape(spec.rank) if param == leaf.a_path else leaf.b_shape(spec.rank)
