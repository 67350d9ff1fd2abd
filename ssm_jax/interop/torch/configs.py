"""The config.json of every model type here: the originals' keys, and a few of ours.

Reading them needs no model, and no PyTorch beyond what ``transformers`` imports. Keys that a class does not name are kept, and mean
nothing.
"""

import math
from typing import Any, ClassVar

from transformers import PreTrainedConfig


class RecurrentConfig(PreTrainedConfig):
    """What all of them have.

    recurrent_chunk_size: tokens that are computed at once; speed and memory only.
    pad_token_id, bos_token_id, eos_token_id: null where texts have none.
    """

    # A config takes any key, which the signature that transformers makes does not say; checkers at run time go by that.
    __no_type_check__ = True
    keys_to_ignore_at_inference = ("past_key_values",)

    recurrent_chunk_size: int = 512
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


class RetNetConfig(RecurrentConfig):
    """RetNet, by the names of torchscale's decoder and of syncdoth/RetNet.

    vocab_size; decoder_embed_dim: D; decoder_value_embed_dim: V; decoder_ffn_embed_dim: F; decoder_layers: L;
    decoder_retention_heads: H, of D / H keys (an even number) and V / H values.
    activation_fn: "relu", "gelu" (exact) or "swish", of the feed-forward network.
    use_glu: a gated feed-forward network without biases; else a plain one with biases, in the middle of which ``subln`` puts a
        LayerNorm, or an RMSNorm if use_ffn_rms_norm.
    use_lm_decay: the decay rates of syncdoth's language models; see ``rel_pos``.
    no_scale_embedding: else the embedding is multiplied by sqrt(D). layernorm_embedding: and then normalised.
    decoder_normalize_before: norms before the sublayers (pre-norm); else after the residual sum.
    deepnorm, subln: as syncdoth settles them. deepnorm means post-norm, residuals times (2 L)^(1/4) and no subln; else subln means
        pre-norm. Post-norm alone is decoder_normalize_before = subln = false.
    layernorm_eps: of every norm. dropout: of the embedding and every sublayer; activation_dropout: after activation_fn.
    z_loss_coeff: weight of mean(log(logsumexp(logits))) in the loss.
    pad_token_id: its embedding is not trained, as in the original, unless texts end or begin with it.
    score_normaliser: null for the exact form; "sum_abs" (torchscale since November 2023, syncdoth) and "abs_sum" (torchscale 0.3.0)
        give the numbers of the originals' parallel form; see ``retention``.

    Raises:
        ValueError: a value that the model does not compute.
    """

    model_type = "retnet"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "decoder_embed_dim",
        "intermediate_size": "decoder_ffn_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_retention_heads",
    }

    vocab_size: int = 50257
    decoder_embed_dim: int = 768
    decoder_value_embed_dim: int = 1280
    decoder_ffn_embed_dim: int = 1280
    decoder_layers: int = 12
    decoder_retention_heads: int = 3
    activation_fn: str = "gelu"
    use_glu: bool = True
    use_ffn_rms_norm: bool = False
    use_lm_decay: bool = False
    no_scale_embedding: bool = True
    layernorm_embedding: bool = False
    decoder_normalize_before: bool = True
    deepnorm: bool = False
    subln: bool = True
    layernorm_eps: float = 1e-6
    dropout: float = 0.0
    activation_dropout: float = 0.0
    z_loss_coeff: float = 0.0
    score_normaliser: str | None = None
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.deepnorm:
            self.decoder_normalize_before, self.subln = False, False
        if self.subln:
            self.decoder_normalize_before = True
        for unknown in ("multiway", "moe_freq", "xpos_rel_pos"):
            if getattr(self, unknown, None):
                raise ValueError(f"{unknown} is {getattr(self, unknown)!r}; this RetNet has none.")
        _require_one_of(self, "activation_fn", "relu", "gelu", "swish")
        _require_one_of(self, "score_normaliser", None, "abs_sum", "sum_abs")


class DenseGauRetNetConfig(RecurrentConfig):
    """DenseRetNet, by the names of LlamaConfig and of the published checkpoints.

    vocab_size; hidden_size: D; num_hidden_layers; num_attention_heads: H.
    query_key_dim: K, of all heads (K / H even). v_factor: E / D, of the values and of the gate.
    dense_block_layers: m; keys and values of the m layers below are added to a layer's own.
    intermediate_k_select_scale, intermediate_v_select_scale: D / width of the bottleneck in the gates of those sums.
    rms_norm_eps: of every norm. dropout: of every layer's output, in training.
    pad_token_id, score_normaliser: as in ``RetNetConfig``; the original is "sum_abs".

    Published folders also have deepnorm, layernorm_eps, retnorm, hidden_act and max_position_embeddings. In the original the first
    shrinks initial weights, and nothing reads the others.
    """

    model_type = "DenseGauRetNet"

    vocab_size: int = 32000
    hidden_size: int = 1536
    num_hidden_layers: int = 16
    num_attention_heads: int = 2
    query_key_dim: int = 768
    v_factor: int | float = 2
    dense_block_layers: int = 2
    intermediate_k_select_scale: int = 32
    intermediate_v_select_scale: int = 32
    rms_norm_eps: float = 1e-6
    dropout: float = 0.1
    score_normaliser: str | None = None
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _require_one_of(self, "score_normaliser", None, "abs_sum", "sum_abs")

    @property
    def value_dim(self) -> int:
        """E."""
        return round(self.v_factor * self.hidden_size)


class GatedStateSpacesConfig(RecurrentConfig):
    """Gated state spaces, by the arguments of GatedStateSpacesLM of gated-state-spaces-pytorch.

    num_tokens: vocabulary; dim: D; depth: layers. dim_expansion_factor: F / D; F is the product truncated to an integer.
    dss_kernel_N: modes, shared by all channels. dss_kernel_H: channels of the state-space branch.
    dss_kernel_lambda_imag_exp: whether Lambda_imag is the logarithm of the frequency.
    final_norm: a LayerNorm before the head, as in the published checkpoint; the package has none.
    accurate: modes and phases in float64, as ``accurate`` of ssm_jax; the package's float32 loses digits after thousands of tokens.
    """

    model_type = "gated_state_spaces"
    attribute_map: ClassVar[dict[str, str]] = {
        "vocab_size": "num_tokens",
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
    }

    num_tokens: int = 256
    dim: int = 512
    depth: int = 8
    dim_expansion_factor: int | float = 4
    dss_kernel_N: int = 512
    dss_kernel_H: int = 256
    dss_kernel_lambda_imag_exp: bool = True
    final_norm: bool = False
    accurate: bool = False


class DenseMambaConfig(RecurrentConfig):
    """DenseMamba, by the names of MambaConfig, and of DenseSSM for what it adds.

    vocab_size; hidden_size: D; num_hidden_layers; state_size: N; conv_kernel: K.
    expand: E / D. intermediate_size: E. time_step_rank: of the projection to step sizes, "auto" for ceil(D / 16).
    use_bias: of in_proj and out_proj. use_conv_bias: of the convolution.
    residual_in_fp32: sums between layers in float32, whatever the type of the model.
    dense_block_layers: m; the hidden states of the m layers below are read out with a layer's own.
    h_select: one gate per "channel" of that sum, one per entry of a channel's "state", or "none".
    intermediate_h_select_scale: D / width of the bottleneck in the gate.
    source_projection: "identity", or "linear" for a matrix [N, N] per layer below.
    time_step_min, time_step_max, time_step_floor, time_step_scale, time_step_init_scheme: initial step sizes.

    Raises:
        ValueError: a value that the model does not compute.
    """

    model_type = "dense_mamba"

    vocab_size: int = 50280
    hidden_size: int = 768
    num_hidden_layers: int = 32
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    intermediate_size: int | None = None
    time_step_rank: int | str = "auto"
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    dense_block_layers: int = 2
    h_select: str = "channel"
    intermediate_h_select_scale: int = 32
    source_projection: str = "identity"
    time_step_min: float = 1e-3
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_scale: float = 1.0
    time_step_init_scheme: str = "random"
    initializer_range: float = 0.1
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.intermediate_size is None:  # as transformers, whose files always say it
            self.intermediate_size = self.inner_size
        _require_one_of(self, "intermediate_size", self.inner_size)
        _require_one_of(self, "hidden_act", "silu", "swish")
        _require_one_of(self, "h_select", "channel", "state", "none")
        _require_one_of(self, "source_projection", "identity", "linear")

    @property
    def inner_size(self) -> int:
        """E."""
        return self.expand * self.hidden_size

    @property
    def step_rank(self) -> int:
        """``time_step_rank`` as a number."""
        return math.ceil(self.hidden_size / 16) if self.time_step_rank == "auto" else int(self.time_step_rank)


class BakaConfig(RecurrentConfig):
    """Baka, by the fields of BakaLLM's BakaConfig, and by ours for what that has none for.

    n_vocab; dim_model: D; n_layers; n_heads.
    dim_ff: of the perceptron, 0 for 4 D. dim_attn: of all heads' queries and keys, 0 for D.
    n_ctx: tokens of a chunk. n_pauses: pauses in it. n_rmt_tokens: R, rows of memory.
    act_fn: "elephant" (or "elephant18_fast"), 1 / (1 + |x / elephant_width|^elephant_power), or "silu".
    mamba_each_nth_layer: n, a Mamba in the layers 0, n, 2 n, ...; 0 for none. d_state, d_conv, expand, dt_rank ("auto" for
        ceil(D / 16)): of it. mamba_carry: whether its state goes on from chunk to chunk.
    rmt_read: whether the first rows of a chunk's output are the memory ("head"), or the last ("tail").
    xl_layer: whose keys and values of the chunk before are read too: the "same" layer's, those of the one "below", or "none".
    chunk_boundary: "stream", a chunk goes on in the next call, or "call", the end of every call ends the chunk.
    norm: "layer" or "rms"; norm_eps.
    gate: "none", "relu", "leaky_relu" or "sigmoid", of each branch. gate_input: what it reads, the branch's input ("x"), its
        output ("y") or their difference ("y-x").
    step: "none", "nstep4" (at every slot) or "step4" (at every fourth). step_shared: one matrix for all layers.
        step_reach: "chunk", or "xl" through the last slots of the chunk before.
    rope_base; dropout; residual_in_fp32: sums between layers in float32, whatever the type of the model.

    recurrent_chunk_size has no meaning here: chunks are the model's own. With chunk_boundary "call" the model is without use_cache,
    so that ``generate`` reads the whole text for every token: a call of one token would be a chunk.

    Raises:
        ValueError: a value that the model does not compute.
    """

    model_type = "baka"
    attribute_map: ClassVar[dict[str, str]] = {
        "vocab_size": "n_vocab",
        "hidden_size": "dim_model",
        "intermediate_size": "dim_ff",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
    }

    n_vocab: int = 50277
    dim_model: int = 768
    dim_ff: int = 0
    dim_attn: int = 0
    n_layers: int = 8
    n_heads: int = 12
    n_ctx: int = 512
    n_pauses: int = 8
    n_rmt_tokens: int = 16
    act_fn: str = "elephant"
    elephant_width: float = 1.0
    elephant_power: float = 8.0
    mamba_each_nth_layer: int = 1
    mamba_carry: bool = False
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | str = "auto"
    rmt_read: str = "tail"
    xl_layer: str = "same"
    chunk_boundary: str = "stream"
    norm: str = "layer"
    norm_eps: float = 1e-5
    gate: str = "none"
    gate_input: str = "x"
    step: str = "none"
    step_shared: bool = False
    step_reach: str = "chunk"
    rope_base: float = 10_000.0
    dropout: float = 0.0
    residual_in_fp32: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.use_cache = self.use_cache and self.chunk_boundary == "stream"
        self.dim_ff, self.dim_attn = self.dim_ff or 4 * self.dim_model, self.dim_attn or self.dim_model
        if self.dim_model % self.n_heads or self.dim_attn % (2 * self.n_heads):
            raise ValueError(
                f"{self.n_heads} heads cannot share {self.dim_attn} keys (an even number each) and {self.dim_model} values."
            )
        _require_one_of(self, "act_fn", "elephant", "elephant18_fast", "silu")
        _require_one_of(self, "rmt_read", "tail", "head")
        _require_one_of(self, "xl_layer", "same", "below", "none")
        _require_one_of(self, "chunk_boundary", "stream", "call")
        _require_one_of(self, "norm", "layer", "rms")
        _require_one_of(self, "gate", "none", "relu", "leaky_relu", "sigmoid")
        _require_one_of(self, "gate_input", "x", "y", "y-x")
        _require_one_of(self, "step", "none", "nstep4", "step4")
        _require_one_of(self, "step_reach", "chunk", "xl")

    @property
    def step_rank(self) -> int:
        """``dt_rank`` as a number."""
        return math.ceil(self.dim_model / 16) if self.dt_rank == "auto" else int(self.dt_rank)

    @property
    def stride(self) -> int:
        """Places from pause to pause."""
        return self.n_ctx // self.n_pauses if self.n_pauses else self.n_ctx

    @property
    def places(self) -> int:
        """Slots of a whole chunk."""
        return self.n_ctx + self.n_pauses + 2 * self.n_rmt_tokens


def _require_one_of(config: PreTrainedConfig, key: str, *allowed: str | int | None) -> None:
    if getattr(config, key) not in allowed:
        raise ValueError(f"{key} is {getattr(config, key)!r}; it must be one of {', '.join(map(repr, allowed))}.")
