"""What the language models here have in common: calls, cache, loss, and what ``generate`` has to know."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_outputs import CausalLMOutputWithPast

from ssm_jax.interop.torch.cache import RecurrentCache
from ssm_jax.interop.torch.steps import Steps

States = Sequence[Tensor | None]
"""The recurrent state that each layer starts from; None before any token."""


class RecurrentLM(PreTrainedModel, GenerationMixin):
    """A language model with a ``RecurrentCache``. A family gives ``decode`` and ``readout``.

    ``generate`` reads a batch of prompts in one call, left-padded where they differ in length, then makes one step per token.
    """

    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: the first call makes the cache."""
        return False

    def decode(self, tokens: Tensor, steps: Steps, states: States, keep: bool) -> "Decoded":
        """The stack of layers on ``tokens`` [B, L]; ``states``: per layer. ``keep``: the layers' inputs too."""
        raise NotImplementedError

    def readout(self, features: Tensor) -> Tensor:
        """Logits of features."""
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of every token from the column before it; labels of -100 are left out."""
        return self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, L, vocabulary] of every column.

        Args:
            input_ids: [B, L], of any length.
            attention_mask: [B, L] or with the columns of earlier calls before; 0 is padding, which is as if it were not there. What
                stands in its columns of the result means nothing.
            past_key_values: the result's of an earlier call, which this one goes on from.
            labels: [B, L]; the loss is of each label from the column before it.
            use_cache: whether the result has ``past_key_values``. Default: as the config says, and not in training.
            output_hidden_states: also the input of every layer, and the features that are read out.
            logits_to_keep: of how many of the last columns; 0 for all.

        Raises:
            ValueError: shapes that do not fit, or a cache with ``score_normaliser``.
        """
        config = self.config
        normaliser = getattr(config, "score_normaliser", None)
        if normaliser and (use_cache or past_key_values is not None):
            raise ValueError(
                f"score_normaliser {normaliser!r} needs the whole sequence; pass use_cache=False, or set it to None."
            )
        steps = Steps.of(input_ids, attention_mask, past_key_values)
        states = [None] * config.num_hidden_layers if past_key_values is None else past_key_values.layers
        keep = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        decoded = self.decode(input_ids, steps, states, keep)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.readout(decoded.features[:, kept])
        if use_cache is None:
            use_cache = config.use_cache and not self.training and not normaliser
        cache = None
        if use_cache:
            read = (steps.number[:, -1] + 1).expand(len(input_ids))
            columns = input_ids.shape[1] + (past_key_values.columns if past_key_values else 0)
            cache = RecurrentCache(decoded.states, read, columns)
        output = CausalLMOutputWithPast(
            loss=None if labels is None else self.loss(logits, labels),
            logits=logits,
            past_key_values=cache,
            hidden_states=(*decoded.residuals, decoded.features) if keep else None,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


@dataclasses.dataclass
class Decoded:
    """What a stack of layers makes of tokens.

    features: [B, L, D], what the head reads. residuals: the input of every layer, where it was to be kept.
    states: of every layer, after the last column.
    """

    features: Tensor
    residuals: list[Tensor]
    states: list[Tensor]


def padding_idx(config: PreTrainedConfig) -> int | None:
    """The token whose embedding is not trained: padding, unless it also stands where texts end or begin."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return None if config.pad_token_id in (*ends, config.bos_token_id) else config.pad_token_id


def torch_linear(linear: nn.Linear, shrink: float = 1.0) -> None:
    """PyTorch's own initial numbers, uniform up to 1 / sqrt(inputs); the weight times ``shrink``."""
    bound = linear.in_features**-0.5
    initialization.uniform_(linear.weight, -bound * shrink, bound * shrink)
    if linear.bias is not None:
        initialization.uniform_(linear.bias, -bound, bound)
