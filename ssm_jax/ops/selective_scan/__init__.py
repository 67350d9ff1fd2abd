"""Stand-in by the lead so that others can run models; its owner replaces this file."""

import jax
import jax.numpy as jnp


def selective_scan(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    state=None,
    reset=None,
    *,
    dt_softplus=True,
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
    if lengths is not None:
        dt = jnp.where((jnp.arange(x.shape[1]) < lengths[:, None])[..., None], dt, 0.0)
    r = jnp.zeros(x.shape[:2], bool) if reset is None else reset
    h0 = jnp.zeros((x.shape[0], A.shape[1], A.shape[0]), f) if state is None else state

    def step(h, t):
        x, dt, b, c, r = t
        h = jnp.where(r[:, None, None], 0, jnp.exp(dt[:, None] * A.T) * h) + (dt * x)[:, None] * b[:, :, None]
        return h, (h * c[:, :, None]).sum(1)

    h, y = jax.lax.scan(step, h0, jax.tree.map(lambda v: v.swapaxes(0, 1), (x, dt, B, C, r)))
    y = y.swapaxes(0, 1)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * jax.nn.silu(z.astype(f))
    return y.astype(dtype), h
