"""BakaLLM's step: one matrix reads the last four inputs of a chunk."""

from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from ssm_jax.nn.slots import Slots
from ssm_jax.typing import Activations

TAPS = 4


class StepForward(nn.Module):
    """y_t = W [x_{t-3}; x_{t-2}; x_{t-1}; x_t] for t >= 3 of a chunk, else 0: the valid part of a dense convolution of width 4.

    Attributes:
        every: "slot" computes it at every slot ("nstep4"), "fourth" at every fourth, counted from the end of the closed chunk
            ("step4"), with 0 elsewhere.
        reach: "chunk" begins with every chunk anew; "past" reads on through the inputs of the chunk before.
    """

    every: Literal["slot", "fourth"] = "slot"
    reach: Literal["chunk", "past"] = "chunk"
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.nowrap
    def init_state(self, batch_size: int, width: int) -> Float[Array, "B W D"]:
        """Zeros: the inputs before any slot."""
        return jnp.zeros((batch_size, TAPS - 1, width), jnp.float32)

    @nn.compact
    def __call__(
        self,
        x_BTD: Activations,
        window_BWD: Float[Array, "B W D"],
        slots: Slots,
        kernel: Float[Array, "K D E"] | None = None,
    ) -> tuple[Activations, Float[Array, "B W D"]]:
        """``kernel``: a matrix that layers share, in place of one of this layer's own."""
        width, length = x_BTD.shape[-1], x_BTD.shape[1]
        inputs = jnp.concatenate([window_BWD.astype(x_BTD.dtype), x_BTD], axis=1)
        read_BTKD = jnp.stack([inputs[:, tap : tap + length] for tap in range(TAPS)], axis=2)
        if kernel is None:
            kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            project = nn.DenseGeneral(
                width, axis=(-2, -1), use_bias=False, kernel_init=self.kernel_init, name="proj", **kinds
            )
            y_BTD = project(read_BTKD)
        else:
            y_BTD = jnp.einsum("btkd,kde->bte", read_BTKD.astype(self.dtype), kernel.astype(self.dtype))
        place_BT = slots.place_BT
        reached = place_BT >= TAPS - 1
        if self.reach == "past":
            reached |= ~slots.fresh_B[:, None]
        if self.every == "fourth":
            reached &= (slots.length_B[:, None] - 1 - place_BT) % TAPS == 0
        count_B = jnp.sum(slots.present_BT, axis=1)
        last_BW = count_B[:, None] + jnp.arange(TAPS - 1)
        exact = jnp.concatenate([window_BWD, x_BTD.astype(window_BWD.dtype)], axis=1)
        window_BWD = jnp.take_along_axis(exact, last_BW[..., None], axis=1)
        return jnp.where(reached[..., None], y_BTD, 0), window_BWD
