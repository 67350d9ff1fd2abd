"""Normalisation with float32 statistics."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float


class GatedRMSNorm(nn.Module):
    """v = y * silu(z), then RMS-normalised in each of ``groups`` slices of the width, times a learned scale (Mamba-2).

    The gate comes first (``norm_before_gate=False`` in mamba_ssm). All arithmetic is float32.
    """

    groups: int = 1
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, y_BLE: Float[Array, "B L E"], z_BLE: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        width = y_BLE.shape[-1]
        scale_E = self.param("scale", nn.initializers.ones, (width,), self.param_dtype)
        v_BLE = y_BLE.astype(jnp.float32) * jax.nn.silu(z_BLE.astype(jnp.float32))
        v_BLGF = v_BLE.reshape(*v_BLE.shape[:-1], self.groups, width // self.groups)
        mean_square = jnp.mean(jnp.square(v_BLGF), axis=-1, keepdims=True)
        normalised = (v_BLGF * jax.lax.rsqrt(mean_square + self.epsilon)).reshape(v_BLE.shape)
        return (normalised * scale_E.astype(jnp.float32)).astype(self.dtype or y_BLE.dtype)
