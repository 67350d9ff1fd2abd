"""Baka (Maykeye's BakaLLM): attention, step, elephants and Mamba with recurrent memory: config, stack, sizes, operation count."""

import dataclasses
import functools
import math
from typing import Any, Literal

from flax import linen as nn
from flax.typing import Initializer

from ssm_jax.models.common import (
    kinds,
    layer_norm,
    require,
    require_chunk,
    require_epsilon,
    require_rate,
    rms_norm,
    round_up,
)
from ssm_jax.nn import initializers
from ssm_jax.nn.chunk_layer import ChunkLayer, GateInput
from ssm_jax.nn.chunked import ChunkedStack, ChunkUnit
from ssm_jax.nn.mixers import Mamba
from ssm_jax.nn.mixers.chunk_attention import ChunkAttention
from ssm_jax.nn.mlp import MLP
from ssm_jax.nn.slots import ChunkShape
from ssm_jax.nn.step_forward import TAPS, StepForward
from ssm_jax.ops.elephant import gated_elephant

_GATE_READS: dict[str, GateInput] = {"x": "input", "y": "output", "y-x": "difference"}
ALIASES = {
    "dim_model": "d_model",
    "dim_ff": "d_mlp",
    "dim_attn": "d_attn",
    "n_vocab": "vocab_size",
    "mamba_each_nth_layer": "mamba_every",
}
"""Names of BakaLLM for what is here."""


@dataclasses.dataclass(frozen=True)
class BakaConfig:
    """Every switch of the family; see ``MambaConfig`` for the shared fields. Defaults are those of ``celp18``, the network of the
    published comparison with Pythia, but for what is marked.

    Attributes:
        n_heads: H. d_mlp: width of the perceptron; None is 4 * d_model. d_attn: of all heads' queries and keys; None is d_model.
        n_ctx: tokens of a chunk. n_pauses: pause tokens in it. n_rmt_tokens: R, rows of memory; 0 for none.
        rmt_read: which rows of a chunk's output are the memory: the write slots' ("tail", not as in celp18) or the first ("head").
        xl_layer: whose keys and values of the chunk before attention reads too: the same layer's, the layer below's, or "none".
        chunk_boundary: "stream": a chunk goes on in the next call, so that a sequence may be split anywhere (not as published).
            "call": the end of every call closes the chunk, however full.
        norm: "layer" or "rms". norm_eps: of both kinds.
        act: "elephant" gates the perceptron with 1 / (1 + |x / a|^d), "silu" with x sigmoid(x). elephant_width: a.
            elephant_power: d.
        gate: activation of the gates around attention, perceptron and step; "none" for no gates. gate_input: what they read: the
            branch's input ("x"), its output ("y"), or their difference ("y-x").
        step: "nstep4" computes a step at every slot, "step4" at every fourth, "none" at none.
            step_shared: one matrix for all layers. step_reach: "chunk" or "xl", through the inputs of the chunk before.
        mamba_every: a Mamba in the layers 0, n, 2n, ...; 0 for none. mamba_carry: its state goes on from chunk to chunk (not as
            published: each chunk begins with zeros). d_state, d_conv, expand, dt_rank: see ``MambaConfig``.
        init: of attention, perceptron and step: "torch", uniform, or "kaiming_normal"; both have the variance 1 / (3 fan_in).
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_mlp: int | None = None
    d_attn: int | None = None
    n_ctx: int = 512
    n_pauses: int = 8
    n_rmt_tokens: int = 16
    rmt_read: Literal["tail", "head"] = "tail"
    xl_layer: Literal["same", "below", "none"] = "same"
    chunk_boundary: Literal["stream", "call"] = "stream"
    norm: Literal["layer", "rms"] = "layer"
    act: Literal["elephant", "silu"] = "elephant"
    elephant_width: float = 1.0
    elephant_power: float = 8.0
    gate: Literal["none", "relu", "leaky_relu", "sigmoid"] = "none"
    gate_input: Literal["x", "y", "y-x"] = "x"
    step: Literal["none", "nstep4", "step4"] = "none"
    step_shared: bool = False
    step_reach: Literal["chunk", "xl"] = "chunk"
    mamba_every: int = 1
    mamba_carry: bool = False
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | Literal["auto"] = "auto"
    rope_base: float = 10_000.0
    init: Literal["torch", "kaiming_normal"] = "torch"
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    dropout: float = 0.0
    remat: Literal["none", "dots", "full"] = "none"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        require_rate(self.dropout)
        require_epsilon(self.norm_eps)
        require_chunk(self.chunk_size)
        require(self, "vocab_size", "d_model", "n_layers", "n_heads", "n_ctx", "pad_vocab_size_multiple")
        require(
            self,
            "d_state",
            "d_conv",
            "expand",
            *(name for name in ("d_mlp", "d_attn") if getattr(self, name) is not None),
        )
        if self.dt_rank != "auto":
            require(self, "dt_rank")
        for name in ("n_pauses", "n_rmt_tokens", "mamba_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.n_pauses > self.n_ctx:
            raise ValueError(
                f"n_pauses is {self.n_pauses} in chunks of n_ctx = {self.n_ctx} tokens; it can be at most that"
            )
        for name, width in (("d_model", self.d_model), ("d_attn", self.d_attn_resolved)):
            if width % self.n_heads:
                raise ValueError(f"n_heads {self.n_heads} does not divide {name} = {width}; choose one that does")
        if self.d_attn_resolved // self.n_heads % 2:
            raise ValueError(
                f"d_attn / n_heads = {self.d_attn_resolved} / {self.n_heads} is odd; rotary positions turn pairs"
            )
        if not 0 < self.elephant_width < float("inf"):
            raise ValueError(f"elephant_width is {self.elephant_width}; it must be above 0")
        if not 1 <= self.elephant_power < float("inf"):
            raise ValueError(f"elephant_power is {self.elephant_power}; it must be at least 1")
        if not 1 < self.rope_base < float("inf"):
            raise ValueError(f"rope_base is {self.rope_base}; it must be above 1")
        if self.step == "none" and (self.step_shared or self.step_reach != "chunk"):
            raise ValueError("step is 'none', and step_shared or step_reach is set; set step too, or drop them")
        if self.mamba_carry and not self.mamba_every:
            raise ValueError("mamba_carry is set and mamba_every is 0; set mamba_every, or drop mamba_carry")

    @property
    def d_mlp_resolved(self) -> int:
        return 4 * self.d_model if self.d_mlp is None else self.d_mlp

    @property
    def d_attn_resolved(self) -> int:
        return self.d_model if self.d_attn is None else self.d_attn

    @property
    def dt_rank_resolved(self) -> int:
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else int(self.dt_rank)

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, self.pad_vocab_size_multiple)

    @property
    def chunk(self) -> ChunkShape:
        """What a chunk holds."""
        return ChunkShape(self.n_ctx, self.n_pauses, self.n_rmt_tokens, self.chunk_boundary == "call")


def norm(config: BakaConfig) -> nn.Module:
    """LayerNorm or RMSNorm over the model's width."""
    return layer_norm(config) if config.norm == "layer" else rms_norm(config)


def stack(config: BakaConfig) -> ChunkedStack:
    """All layers: units of ``mamba_every`` layers, of which the first has a Mamba, and what remains."""
    size = config.mamba_every or 1
    repeats, rest = divmod(config.n_layers, size)

    def unit(members: int) -> ChunkUnit | None:
        return (
            ChunkUnit(tuple(_layer(config, bool(config.mamba_every) and i == 0) for i in range(members)))
            if members
            else None
        )

    return ChunkedStack(
        shape=config.chunk,
        units=unit(size) if repeats else None,
        rest=unit(rest),
        repeats=repeats,
        width=config.d_model,
        head=config.rmt_read == "head",
        step_init=_init(config) if config.step_shared else None,
        remat=config.remat,
        param_dtype=kinds(config)["param_dtype"],
    )


def _layer(config: BakaConfig, with_mamba: bool) -> ChunkLayer:
    attention = ChunkAttention(
        heads=config.n_heads,
        head_dim=config.d_attn_resolved // config.n_heads,
        value_dim=config.d_model // config.n_heads,
        places=config.chunk.places,
        cached=config.xl_layer != "none",
        rotary_base=config.rope_base,
        kernel_init=_init(config),
        **kinds(config),
    )
    elephant = functools.partial(gated_elephant, width=config.elephant_width, power=config.elephant_power)
    mlp = MLP(
        width=config.d_mlp_resolved,
        activation=config.act,
        gated=True,
        gate=elephant if config.act == "elephant" else None,
        bias=False,
        kernel_init=_init(config),
        out_init=_init(config),
        **kinds(config),
    )
    step = StepForward(
        every="fourth" if config.step == "step4" else "slot",
        reach="past" if config.step_reach == "xl" else "chunk",
        kernel_init=_init(config),
        **kinds(config),
    )
    mamba = Mamba(
        d_inner=config.expand * config.d_model,
        dt_rank=config.dt_rank_resolved,
        d_state=config.d_state,
        d_conv=config.d_conv,
        chunk_size=config.chunk_size,
        **kinds(config),
    )
    return ChunkLayer(
        norm=norm(config),
        mixer=attention,
        mlp=mlp,
        step=None if config.step == "none" else step,
        gate=None if config.gate == "none" else config.gate,
        gate_reads=_GATE_READS[config.gate_input],
        mamba_norm=norm(config) if with_mamba else None,
        mamba=mamba if with_mamba else None,
        mamba_carried=config.mamba_carry,
        cache=None if config.xl_layer == "none" else config.xl_layer,
        dropout=config.dropout,
        **kinds(config),
    )


def _init(config: BakaConfig) -> Initializer:
    return initializers.torch_linear if config.init == "torch" else initializers.kaiming_normal


def flops_per_token(config: BakaConfig, context: int) -> float:
    """Forward operations per token of a document of ``context`` tokens: weight products for it and its share of pauses and memory,
    scores with half of its own chunk and all of the one before, and head."""
    D, A, F, E = config.d_model, config.d_attn_resolved, config.d_mlp_resolved, config.expand * config.d_model
    N, R = config.d_state, config.dt_rank_resolved
    slots = config.chunk.places / config.n_ctx
    own = config.chunk.places * min(context, config.n_ctx) / config.n_ctx
    before = config.chunk.places * max(0.0, 1 - config.n_ctx / context) if config.xl_layer != "none" else 0.0
    branches = 2 + (config.step != "none")
    products = 2 * D * A + 2 * D * D + 3 * D * F + TAPS * D * D * (config.step != "none")
    products += branches * D * D * (config.gate != "none")
    attention = (A + D) * ((own + 1) / 2 + before)
    mamba = D * 2 * E + E * (R + 2 * N) + R * E + E * D + config.d_conv * E + 9 * E * N / 2
    with_mamba = -(-config.n_layers // config.mamba_every) if config.mamba_every else 0
    layers = config.n_layers * (products + attention) + with_mamba * mamba
    return 2.0 * (slots * layers + D * config.padded_vocab_size)


_PUBLISHED = {"vocab_size": 50277, "d_model": 768, "n_heads": 12, "d_mlp": 3072}
PRESETS: dict[str, dict[str, Any]] = {
    "baka-celp18": {**_PUBLISHED, "n_layers": 8, "rmt_read": "head"},
    "baka-mamba12": {**_PUBLISHED, "n_layers": 12, "mamba_every": 2},
    "baka-rmt12": {**_PUBLISHED, "n_layers": 12, "mamba_every": 0},
    "baka-steps": {
        **_PUBLISHED,
        "n_layers": 12,
        "mamba_every": 0,
        "n_rmt_tokens": 0,
        "xl_layer": "below",
        "norm": "rms",
        "norm_eps": 1e-6,
        "gate": "relu",
        "step": "nstep4",
        "init": "kaiming_normal",
    },
}
"""Maykeye/BakaLLM: 00x_celp18 and 008_mamba88d, 007_mamba, 005, 00x_steps; with chunks that go on from call to call."""
