"""The two factors of a kernel's change, and their product."""

import math
import zlib
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssm_jax.optim.relora.spec import Leaf
from ssm_jax.typing import Key

Compat = Literal["reference", "v1"]
"""Whose mistakes to repeat. "reference": the newest code of the authors; "v1": that of the paper's first version."""


def init(
    key: Key, leaf: Leaf, rank: int, dtype: str | None = None, compat: Compat | None = None
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """A uniform in (-1/sqrt(n), 1/sqrt(n)) with n inputs (Kaiming's with a = sqrt 5), B zero, so that the function stays as it is.

    The draw depends on the key and on the kernel's path, neither on the order of kernels nor on devices. ``compat``: "reference"
    makes A zero too, so that nothing is learnt before the first merge; "v1" draws B as well, which changes the function.
    """
    a_key, b_key = jax.random.split(jax.random.fold_in(key, zlib.crc32(leaf.path.encode())))
    a_shape, b_shape, kind = leaf.a_shape(rank), leaf.b_shape(rank), jnp.dtype(dtype or leaf.dtype)
    a = jnp.zeros(a_shape, kind) if compat == "reference" else _uniform(a_key, a_shape, leaf.width_in, kind)
    b = _uniform(b_key, b_shape, rank, kind) if compat == "v1" else jnp.zeros(b_shape, kind)
    return a, b


def product(
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    leaf: Leaf,
    scale: float | Float[Array, ""],
    dtype: jnp.dtype | None = None,
) -> Float[Array, "..."]:
    """scale * A B with the axes in the kernel's own order, computed and returned in ``dtype`` (default: at least float32)."""
    kind = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32) if dtype is None else dtype
    letters = [chr(ord("a") + axis) for axis in range(len(leaf.shape))]
    batch, inputs, outputs = (
        "".join(letters[axis] for axis in axes) for axes in (leaf.batch, leaf.inputs, leaf.outputs)
    )
    equation = f"{batch}{inputs}R,{batch}R{outputs}->{''.join(letters)}"
    return scale * jnp.einsum(equation, a.astype(kind), b.astype(kind), precision=jax.lax.Precision.HIGHEST)


def _uniform(key: Key, shape: tuple[int, ...], width: int, dtype: jnp.dtype) -> Array:
    bound = 1 / math.sqrt(width)
    return jax.random.uniform(key, shape, jnp.promote_types(dtype, jnp.float32), -bound, bound).astype(dtype)
