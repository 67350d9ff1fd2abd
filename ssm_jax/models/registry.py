"""Families and published sizes, by name."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
from flax.typing import Initializer

from ssm_jax import config as config_lib
from ssm_jax.errors import ConfigError
from ssm_jax.models import baka, dense_mamba, dense_retnet, gpt2, gpt_neox, gss, llama, mamba, mamba2, retnet
from ssm_jax.models.common import layer_norm, rms_norm, round_up
from ssm_jax.nn import initializers
from ssm_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class Family:
    """What the shell needs of a family.

    config: its frozen dataclass. layer: the unit that is stacked and scanned, ``repeats`` times. presets: name -> config fields.
    flops_per_token: (config, context) -> multiply-adds counted twice, of one forward pass.
    final_norm: what stands between the last layer and the head; None for nothing.
    embedding_std: config -> that of the new token table. embedding_scale: what token vectors are multiplied with.
    embedding_norm: what follows; None for nothing. head_init: initialiser of a head of its own.
    context_limit: tokens that no document may exceed; None where there is no limit. learned_positions: whether they are the rows
        of a table that is added to the tokens'.
    derive: (config, params, length, documents) -> params with more leaves, which follow from them alone and which the layers use
        in their place: computed once per update or decoding, instead of in every call. ``length`` is that of the rows, None for
        single tokens; ``documents``: whether rows come with positions.
    chunk: config -> tokens that are read as one, 1 where every token is read for itself: calls of a multiple of it, from a
        document's start, give what the whole document gives however a call's end is understood.
    chunked: whether ``layer`` is the whole stack, a ``ChunkedStack``, in which a document begins with a call.
    aliases: other names of config fields.
    """

    config: type
    layer: Callable[[Any], nn.Module]
    presets: Mapping[str, Mapping[str, Any]]
    flops_per_token: Callable[[Any, int], float]
    repeats: Callable[[Any], int] = lambda config: int(config.n_layers)
    final_norm: Callable[[Any], nn.Module | None] = rms_norm
    embedding_std: Callable[[Any], float] = lambda config: 0.02
    embedding_scale: Callable[[Any], float] = lambda config: 1.0
    embedding_norm: Callable[[Any], nn.Module | None] = lambda config: None
    head_init: Initializer = initializers.torch_linear
    context_limit: Callable[[Any], int | None] = lambda config: None
    learned_positions: bool = False
    derive: Callable[[Any, Params, int | None, bool], Params] = lambda config, params, length, documents: params
    chunk: Callable[[Any], int] = lambda config: 1
    chunked: bool = False
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _torch_embedding_std(config: Any) -> float:
    """1, as PyTorch's default; as a head too, such a table would begin with logits of deviation sqrt(d_model)."""
    return float(config.d_model**-0.5) if config.tie_embeddings else 1.0


FAMILIES: dict[str, Family] = {
    "mamba": Family(mamba.MambaConfig, mamba.layer, mamba.PRESETS, mamba.flops_per_token),
    "mamba2": Family(mamba2.Mamba2Config, mamba2.layer, mamba2.PRESETS, mamba2.flops_per_token),
    "dense_mamba": Family(
        dense_mamba.DenseMambaConfig, dense_mamba.layer, dense_mamba.PRESETS, dense_mamba.flops_per_token
    ),
    "gss": Family(
        gss.GSSConfig,
        gss.layer,
        gss.PRESETS,
        gss.flops_per_token,
        repeats=gss.repeats,
        final_norm=gss.final_norm,
        embedding_std=_torch_embedding_std,
        derive=gss.derive,
        aliases=gss.ALIASES,
    ),
    "retnet": Family(
        retnet.RetNetConfig,
        retnet.layer,
        retnet.PRESETS,
        retnet.flops_per_token,
        final_norm=retnet.final_norm,
        embedding_std=lambda config: float(config.d_model**-0.5),
        embedding_scale=retnet.embedding_scale,
        embedding_norm=retnet.embedding_norm,
        head_init=nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
    ),
    "dense_retnet": Family(
        dense_retnet.DenseRetNetConfig,
        dense_retnet.layer,
        dense_retnet.PRESETS,
        dense_retnet.flops_per_token,
        head_init=nn.initializers.normal(0.02),
    ),
    "gpt2": Family(
        gpt2.GPT2Config,
        gpt2.layer,
        gpt2.PRESETS,
        gpt2.flops_per_token,
        final_norm=layer_norm,
        context_limit=lambda config: config.n_positions,
        learned_positions=True,
    ),
    "gpt_neox": Family(
        gpt_neox.GPTNeoXConfig,
        gpt_neox.layer,
        gpt_neox.PRESETS,
        gpt_neox.flops_per_token,
        final_norm=layer_norm,
        embedding_std=gpt_neox.embedding_std,
        head_init=gpt_neox.SMALL_INIT,
        context_limit=lambda config: config.n_positions,
        aliases=gpt_neox.ALIASES,
    ),
    "llama": Family(
        llama.LlamaConfig,
        llama.layer,
        llama.PRESETS,
        llama.flops_per_token,
        head_init=llama.INIT,
        context_limit=lambda config: config.n_positions,
        aliases=llama.ALIASES,
    ),
    "baka": Family(
        baka.BakaConfig,
        baka.stack,
        baka.PRESETS,
        baka.flops_per_token,
        final_norm=baka.norm,
        embedding_std=_torch_embedding_std,
        chunk=lambda config: config.n_ctx,
        chunked=True,
        aliases=baka.ALIASES,
    ),
}

PRESETS: dict[str, str] = {name: family for family, entry in FAMILIES.items() for name in entry.presets}
"""Published size -> family."""


def family_name(config: Any) -> str:
    """The name of the family that a config object belongs to."""
    for name, family in FAMILIES.items():
        if type(config) is family.config:
            return name
    raise ConfigError(
        f"{type(config).__name__} is not the config of a family (pass model.config); the families are {', '.join(FAMILIES)}."
    )


def family_of(config: Any) -> Family:
    """The family that a config object belongs to."""
    return FAMILIES[family_name(config)]


def make_config(name: str, **fields: Any) -> Any:
    """The config of a family ("mamba") or of a published size ("mamba-130m"), with fields set or overridden.

    "gpt2" is both, and here the size.
    """
    if name in PRESETS:
        family = FAMILIES[PRESETS[name]]
        return config_of(family, fields, family.presets[name])
    if name in FAMILIES:
        return config_of(FAMILIES[name], fields)
    raise ConfigError(f"Model {name!r} is unknown; {config_lib.suggest(name, [*FAMILIES, *PRESETS])}")


def context_limit(config: Any) -> int | None:
    """The most tokens of a document that a model with this config can read; None where there is no such limit."""
    return family_of(config).context_limit(config)


def restarts_within_calls(config: Any) -> bool:
    """Whether documents may begin anywhere in a row; else each begins with a call."""
    return not family_of(config).chunked


def whole_chunks(config: Any, tokens: int) -> int:
    """The least number of whole chunks' tokens that is not below ``tokens``; ``tokens`` itself where nothing is read in chunks."""
    return round_up(tokens, family_of(config).chunk(config))


def config_of(family: Family, fields: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Any:
    """A family's config from fields, under their own names or ``Family.aliases``, that override ``defaults``."""
    plain: dict[str, Any] = {}
    for name, value in fields.items():
        own = family.aliases.get(name, name)
        if own in plain:
            raise ConfigError(f"Config keys 'model.{own}' and its other name are both set; keep one.")
        plain[own] = value
    return config_lib.from_dict(family.config, {**(defaults or {}), **plain}, "model.")


def config_from_dict(content: Mapping[str, Any]) -> Any:
    """A model config from a mapping with the key ``family`` or ``preset`` and any of the config's fields."""
    fields = dict(content)
    preset, family = fields.pop("preset", None), fields.pop("family", None)
    if preset is None and family is None:
        raise ConfigError(f"Config key 'model.family' is required; one of {', '.join(FAMILIES)} (or model.preset).")
    if preset is not None and family is not None and PRESETS.get(preset, family) != family:
        raise ConfigError(
            f"Config key 'model.preset' is {preset!r}, which is not of model.family {family!r}; drop one."
        )
    if preset is None and family in FAMILIES:
        return config_of(FAMILIES[family], fields)
    return make_config(str(preset or family), **fields)


def config_to_dict(config: Any) -> dict[str, Any]:
    """The inverse of ``config_from_dict``: every field, and ``family``."""
    return {"family": family_name(config), **config_lib.to_dict(config)}
