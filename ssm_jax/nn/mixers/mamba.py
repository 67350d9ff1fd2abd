"""The Mamba-1 mixer (Gu & Dao 2023, arXiv:2312.00752, section 3.4), alone or with the hidden states of other layers."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from ssm_jax.nn import initializers
from ssm_jax.nn import positions as positions_lib
from ssm_jax.nn.conv import CausalConv
from ssm_jax.nn.dense import Gate, Shallow
from ssm_jax.nn.halves import halves
from ssm_jax.nn.state import MambaState
from ssm_jax.ops import selective_scan
from ssm_jax.ops.silu import gated_silu
from ssm_jax.typing import Activations, Lengths, Positions, Reset

GateKind = Literal["channel", "state"]


class Recurrence(NamedTuple):
    """The recurrence of a layer without its read-out: the arguments of ``selective_scan`` but for C."""

    x_BLE: Array
    dt_BLR: Array
    dt_up_RE: Array
    A_EN: Array
    B_BLN: Array
    dt_bias_E: Array
    state_BNE: Array


class Mamba(nn.Module):
    """Selective state-space mixer: in_proj -> causal conv -> selective scan, gated -> out_proj.

        [x, z] = u W_in;  x = silu(conv(x));  dt = softplus(x W_dt + b);  B, C = x W_B, x W_C
        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = C_t h_t + D x_t;  out = (y * silu(z)) W_out

    ``fused`` reads the hidden states h^i of shallower layers with this layer's C, y_t += gate(u_t) * sum_i C_t proj_i(h^i_t), and
    carries its own h unfused. For a sequence the states of no token are ever stored: each of those recurrences runs again,
    m + 1 scans instead of arrays L N E. One token finds the states that the shallower layers have just reached.

    Attributes:
        d_inner: E, width of x and z.
        d_state: N. d_conv: K. dt_rank: R, rank of the step-size projection.
        bias, conv_bias: whether in/out projections and the convolution carry a bias.
        dt_min, dt_max, dt_init_floor, dt_init, dt_scale: initialisation of the step sizes.
        out_init_scale: factor on the output projection's initialisation, 1/sqrt(layers) in a language model.
        gate, gate_bottleneck: of ``fused``: one gate per "channel", or per entry of a channel's "state", after a layer of that
            width; None for no gate.
        source_matrices: whether proj_i is a matrix over a channel's state, or the identity.
        chunk_size: speed knob of the scan; the result does not depend on it.
    """

    d_inner: int
    dt_rank: int
    d_state: int = 16
    d_conv: int = 4
    bias: bool = False
    conv_bias: bool = True
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_init: str = "random"
    dt_scale: float = 1.0
    out_init_scale: float = 1.0
    gate: GateKind | None = None
    gate_bottleneck: int = 1
    source_matrices: bool = False
    chunk_size: int | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.nowrap
    def init_state(self, batch_size: int, capacity: int | None = None) -> MambaState:
        """Zeros: the state before any token, the same for every ``capacity``."""
        return MambaState(
            conv=jnp.zeros((batch_size, self.d_conv - 1, self.d_inner), jnp.float32),
            ssm=jnp.zeros((batch_size, self.d_state, self.d_inner), jnp.float32),
        )

    @nn.nowrap
    def features_like(self, x_BLD: Activations) -> Recurrence | Float[Array, "B N E"]:
        """A recurrence at rest; for one token its state."""
        batch, length, _ = x_BLD.shape
        state = jnp.zeros((batch, self.d_state, self.d_inner), jnp.float32)
        if length == 1:
            return state
        widths = (self.d_inner, self.dt_rank, self.d_state)
        x, dt, B = (jnp.zeros((batch, length, width), self.dtype) for width in widths)
        dt_up = jnp.zeros((self.dt_rank, self.d_inner), self.dtype)
        A = jnp.zeros((self.d_inner, self.d_state), jnp.float32)
        return Recurrence(x, dt, dt_up, A, B, jnp.zeros((self.d_inner,), self.param_dtype), state)

    def __call__(
        self, x_BLD: Activations, state: MambaState | None = None, positions: Positions | None = None
    ) -> tuple[Activations, MambaState]:
        """Without other layers' features."""
        out, state, _ = self._mix(x_BLD, state, positions, None)
        return out, state

    def fused(
        self, x_BLD: Activations, state: MambaState | None, positions: Positions | None, shallow: Shallow
    ) -> tuple[Activations, MambaState, Recurrence | Array]:
        """With the hidden states of the layers below; the third result stands for this layer's own."""
        return self._mix(x_BLD, state, positions, shallow)

    @nn.compact
    def _mix(
        self, x_BLD: Activations, state: MambaState | None, positions: Positions | None, shallow: Shallow | None
    ) -> tuple[Activations, MambaState, Recurrence | Array]:
        reset, lengths = positions_lib.resets(positions), positions_lib.lengths(positions)
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        xz = nn.DenseGeneral(
            (2, self.d_inner), use_bias=self.bias, kernel_init=initializers.torch_linear, name="in_proj", **kinds
        )(x_BLD)
        x_BLE, z_BLE = halves(xz)
        conv = CausalConv(self.d_conv, self.conv_bias, self.param_dtype, name="conv")
        x_BLE, window = conv(x_BLE, state.conv if state else None, reset, lengths)

        def low_rank(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, kernel_init=initializers.torch_linear, name=name, **kinds)

        dt_BLR = low_rank(self.dt_rank, "dt_down")(x_BLE)
        B_BLN = low_rank(self.d_state, "B_proj")(x_BLE)
        C_BLN = low_rank(self.d_state, "C_proj")(x_BLE)
        dt_up_init = initializers.constant_or_uniform(self.dt_scale * self.dt_rank**-0.5, self.dt_init)
        dt_up = _Kernel((self.dt_rank, self.d_inner), dt_up_init, self.param_dtype, name="dt_up")
        dt_up_RE = dt_up().astype(dt_BLR.dtype)
        dt_bias_init = initializers.inverse_softplus_log_uniform(self.dt_min, self.dt_max, self.dt_init_floor)
        dt_bias_E = self.param("dt_bias", dt_bias_init, (self.d_inner,), self.param_dtype)
        A_log_EN = self.param("A_log", initializers.s4d_real, (self.d_inner, self.d_state), self.param_dtype)
        D_E = self.param("D", nn.initializers.ones, (self.d_inner,), self.param_dtype)

        A_EN = -jnp.exp(A_log_EN.astype(jnp.float32))
        start = state.ssm if state else self.init_state(len(x_BLD)).ssm
        own = Recurrence(x_BLE, dt_BLR, dt_up_RE, A_EN, B_BLN, dt_bias_E, start)
        others = shallow.sources if shallow is not None else ()
        y_BLE, ssm = selective_scan(
            x_BLE,
            dt_BLR,
            A_EN,
            B_BLN,
            C_BLN,
            D_E,
            None if others else z_BLE,
            dt_bias_E,
            start,
            reset,
            dt_up_RE=dt_up_RE,
            lengths=lengths,
            chunk_size=self.chunk_size,
        )
        if others:
            y_BLE = y_BLE + self._read_others(others, C_BLN, x_BLD, reset, lengths)
            y_BLE = gated_silu(y_BLE, z_BLE)
        out_init = initializers.scaled_torch_linear(self.out_init_scale)
        out = nn.Dense(x_BLD.shape[-1], use_bias=self.bias, kernel_init=out_init, name="out_proj", **kinds)(y_BLE)
        return out, MambaState(conv=window, ssm=ssm), ssm if x_BLD.shape[1] == 1 else own

    def _read_others(
        self,
        sources: tuple[Any, ...],
        C_BLN: Float[Array, "B L N"],
        u_BLD: Activations,
        reset: Reset | None,
        lengths: Lengths | None,
    ) -> Float[Array, "B L E"]:
        """sum_i C proj_i(h^i) * gate, the gate within each scan: that stores neither what it multiplies nor its silu."""
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        gate_BLE: Array | None = None
        if self.gate == "channel":
            gate_BLE = Gate((self.d_inner,), self.gate_bottleneck, activated=False, name="gate", **kinds)(u_BLD)
        elif self.gate == "state":
            C_BLN = C_BLN * Gate((self.d_state,), self.gate_bottleneck, name="gate", **kinds)(u_BLD)
        total = jnp.zeros((), self.dtype)
        for i, source in enumerate(sources):
            if self.source_matrices:
                # C (P h) = (C P) h: the matrix is applied to one vector per token instead of one per channel.
                C_i = nn.Dense(
                    self.d_state, use_bias=False, kernel_init=initializers.orthogonal, name=f"source_{i}", **kinds
                )(C_BLN)
            else:
                C_i = C_BLN
            total = total + _read(source, C_i, gate_BLE, reset, lengths, self.chunk_size)
        return total


class _Kernel(nn.Module):
    """A matrix that is multiplied elsewhere, under the name that ``nn.Dense`` would give it."""

    shape: tuple[int, int]
    kernel_init: Initializer
    param_dtype: Dtype

    @nn.compact
    def __call__(self) -> Float[Array, "R E"]:
        return self.param("kernel", self.kernel_init, self.shape, self.param_dtype)


def _read(
    source: Recurrence | Array,
    C_BLN: Float[Array, "B L N"],
    gate_BLE: Float[Array, "B L E"] | None,
    reset: Reset | None,
    lengths: Lengths | None,
    chunk_size: int | None,
) -> Float[Array, "B L E"]:
    """C_t h_t * silu(gate) of another layer's recurrence, which runs again; of its state after a single token."""
    if not isinstance(source, Recurrence):
        y = jnp.einsum("bln,bne->ble", C_BLN.astype(source.dtype), source).astype(C_BLN.dtype)
        return y if gate_BLE is None else gated_silu(y, gate_BLE)
    x, dt, dt_up, A, B, dt_bias, start = source
    y, _ = selective_scan(
        x,
        dt,
        A,
        B,
        C_BLN,
        None,
        gate_BLE,
        dt_bias,
        start,
        reset,
        dt_up_RE=dt_up,
        lengths=lengths,
        chunk_size=chunk_size,
    )
    return y
