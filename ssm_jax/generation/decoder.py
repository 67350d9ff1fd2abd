"""One-token steps of a language model, with everything that does not change between tokens done once before the loop.

Slicing the stacked weights of a layer scan copies every weight for every token. Where a second copy of the layers fits
(``UNROLL_LIMIT``), the decoder holds the layers apart and applies them one after another; that halves the time per token on
a CPU. Larger models keep the scan and one copy of their weights.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ssm_jax.errors import GenerationError
from ssm_jax.models import LanguageModel, registry
from ssm_jax.nn.state import LMState
from ssm_jax.typing import Params, PyTree

UNROLL_LIMIT = 2**31
"""Bytes of stacked layer parameters up to which a decoder holds a second, unstacked copy of them."""


class Decoder(NamedTuple):
    """What a step reads.

    params: the model's parameters; ``params["layers"]`` is a tuple with one entry per layer, or stacked as in the model. Where the
        layers are a ``ChunkedStack``, ``params["apart"]`` is that tuple, and "layers" holds what belongs to no single layer.
    readout_DV: the head matrix, in the dtype of the features.
    """

    params: Params
    readout_DV: Float[Array, "D V"]


def make_decoder(model: LanguageModel, params: Params, unroll_limit: int = UNROLL_LIMIT) -> Decoder:
    """The decoder of a model: its layers apart if they are small enough, its head laid out for row vectors."""
    if "layers" not in params:
        raise GenerationError(
            f"params has the keys {sorted(params)} and no 'layers'; pass the model's parameters, such as model.init(...)['params']."
        )
    layer_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params["layers"]))
    return _make_decoder(model, params, layer_bytes <= unroll_limit)


@functools.partial(jax.jit, static_argnames=("model", "apart"))
def _make_decoder(model: LanguageModel, params: Params, apart: bool) -> Decoder:
    family = registry.family_of(model.config)
    params = family.derive(model.config, params, None, False)
    if apart and family.chunked:
        stacks, outside = _stacks(params["layers"])
        params = {**params, "layers": outside, "apart": _unstack_all(stacks)}
    elif apart:
        params = {**params, "layers": _unstack(params["layers"], family.repeats(model.config))}
    return Decoder(params, model.readout(params).astype(model.config.dtype))


def unstack_state(decoder: Decoder, state: LMState) -> LMState:
    """``state`` in the form that ``decode_step`` carries: layer by layer if the decoder holds its layers apart."""
    layers = decoder.params["layers"]
    if "apart" in decoder.params:
        return dataclasses.replace(state, layers=_unstack_all(_stacks(state.layers)[0]))
    return LMState(_unstack(state.layers, len(layers)), state.position) if isinstance(layers, tuple) else state


def decode_step(
    model: LanguageModel, decoder: Decoder, token_B: Int[Array, "B"], state: LMState
) -> tuple[Float[Array, "B V"], LMState]:
    """Logits after one more token per lane, padded vocabulary rows left out, and the new state."""
    output: Any
    if "apart" in decoder.params:
        layers = (decoder.params["layers"], decoder.params["apart"])
        output = model.apply({"params": decoder.params}, token_B[:, None], state, layers, method="features_of_layers")
    elif isinstance(decoder.params["layers"], tuple):
        outside = {name: value for name, value in decoder.params.items() if name != "layers"}
        layers = decoder.params["layers"]
        output = model.apply({"params": outside}, token_B[:, None], state, layers, method="features_of_layers")
    else:
        output = model.apply({"params": decoder.params}, token_B[:, None], state, method="features")
    features_B1D, state = output
    return logits_of(model, decoder, features_B1D[:, 0]), state


def logits_of(model: LanguageModel, decoder: Decoder, features_BD: Float[Array, "B D"]) -> Float[Array, "B V"]:
    """float32 logits over the real vocabulary."""
    logits_BV = jnp.einsum("bd,dv->bv", features_BD, decoder.readout_DV, preferred_element_type=jnp.float32)
    return logits_BV[:, : model.config.vocab_size]


def _stacks(layers: Mapping[str, PyTree]) -> tuple[list[PyTree], dict[str, PyTree]]:
    """The stacks of a ``ChunkedStack``'s parameters or states in their order, and what else there is."""
    names = [name for name in ("units", "rest") if name in layers]
    return [layers[name] for name in names], {name: leaf for name, leaf in layers.items() if name not in names}


def _unstack_all(stacks: list[PyTree]) -> tuple[PyTree, ...]:
    """The entries of several stacks, one after another."""
    return tuple(entry for stack in stacks for entry in _unstack(stack, len(jax.tree.leaves(stack)[0])))


def _unstack(stacked: PyTree, n_layers: int) -> tuple[PyTree, ...]:
    def layer(i: int) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[i], stacked)

    return tuple(layer(i) for i in range(n_layers))
