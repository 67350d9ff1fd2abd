"""Stand-in by the lead so that others can run models; its owner replaces this file."""

import jax
import jax.numpy as jnp


def ssd(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    dt_bias=None,
    state=None,
    reset=None,
    *,
    dt_softplus=True,
    dt_limit=(0.0, float("inf")),
    lengths=None,
    implementation=None,
    chunk_size=None,
):
    f = jnp.float32
    dtype = x.dtype
    x, dt, B, C = (v.astype(f) for v in (x, dt, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = jax.nn.softplus(dt)
    dt = jnp.clip(dt, *dt_limit)
    H = x.shape[2]
    G = B.shape[2]
    if lengths is not None:
        dt = jnp.where((jnp.arange(x.shape[1]) < lengths[:, None])[..., None], dt, 0.0)
    r = jnp.zeros(x.shape[:2], bool) if reset is None else reset
    B = jnp.repeat(B, H // G, 2)
    C = jnp.repeat(C, H // G, 2)
    h0 = jnp.zeros((x.shape[0], H, B.shape[-1], x.shape[-1]), f) if state is None else state

    def step(h, t):
        x, dt, b, c, r = t
        h = (
            jnp.where(r[:, None, None, None], 0, jnp.exp(dt * A)[..., None, None] * h)
            + b[..., None] * (dt[..., None] * x)[..., None, :]
        )
        return h, jnp.einsum("bhn,bhnp->bhp", c, h)

    h, y = jax.lax.scan(step, h0, jax.tree.map(lambda v: v.swapaxes(0, 1), (x, dt, B, C, r)))
    y = y.swapaxes(0, 1)
    if D is not None:
        y = y + D[:, None] * x
    return y.astype(dtype), h
