"""Keys and values of attention over blocks of W tokens, kept by their place: row p of a cache [B, G, S, P] is that of the
document's last token at position p modulo W, zeros where there is none yet. A token costs one row, and nothing moves."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Cache = Float[Array, "B G S P"]
Rows = Float[Array, "B L G P"]


def storable(k_BLGP: Rows, v_BLGP: Rows) -> tuple[Rows, Rows]:
    """Keys and values in float32 as they are kept. Where one has an entry that is not finite, the key is all NaN and the value 0.

    The score of a key out of reach is replaced, whatever the key is; a value is multiplied by a weight of zero, and zero times NaN
    is NaN. So what is broken in one block says so from its key, and does not reach the next one.
    """
    k, v = k_BLGP.astype(jnp.float32), v_BLGP.astype(jnp.float32)
    whole = jnp.all(jnp.isfinite(k) & jnp.isfinite(v), axis=-1, keepdims=True)
    return jnp.where(whole, k, jnp.nan), jnp.where(whole, v, 0)


def write_token(cache_BGSP: Cache, x_BGP: Float[Array, "B G P"], row_B: Int[Array, "B"]) -> Cache:
    """The cache with one row of each lane replaced; a row at or beyond S writes nothing."""

    def write(cache_GSP: Array, x_GP: Array, row: Array) -> Array:
        return cache_GSP.at[:, row].set(x_GP, mode="drop")

    return jax.vmap(write)(cache_BGSP, x_BGP, row_B)


def write_tokens(
    cache_BGSP: Cache, x_BLGP: Rows, count_B: Int[Array, "B"], next_B: Int[Array, "B"], block: int
) -> Cache:
    """The cache after the first ``count_B`` of L more tokens, the token after which stands at ``next_B`` in its document."""
    age_BS = (next_B[:, None] - 1 - jnp.arange(cache_BGSP.shape[2])) % block  # tokens after the last one at each place
    source_BS = jnp.clip(count_B[:, None] - 1 - age_BS, 0, x_BLGP.shape[1] - 1)
    new_BGSP = jnp.swapaxes(jnp.take_along_axis(x_BLGP, source_BS[..., None, None], axis=1), 1, 2)

    def at(condition_BS: Array) -> Array:
        return condition_BS[:, None, :, None]

    kept = jnp.where(at(age_BS < count_B[:, None]), new_BGSP, cache_BGSP)
    return jnp.where(at(age_BS < next_B[:, None]), kept, 0)


def in_order(cache_BGSP: Cache, next_B: Int[Array, "B"], block: int) -> Float[Array, "B S G P"]:
    """The rows as a stretch of time that ends before the token at ``next_B``. What it does not reach may be any of them."""
    keys = cache_BGSP.shape[2]
    place_BS = (next_B[:, None] - jnp.arange(keys, 0, -1)) % block
    rows_BS = jnp.minimum(place_BS, keys - 1)
    return jnp.swapaxes(jnp.take_along_axis(cache_BGSP, rows_BS[:, None, :, None], axis=2), 1, 2)
