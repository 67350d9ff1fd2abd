"""The loss of a batch, as a sum and a weight, so that parts of a batch add up."""

from collections.abc import Mapping

import jax
from jaxtyping import Array, Float

from ssm_jax.models import LanguageModel
from ssm_jax.ops import linear_cross_entropy
from ssm_jax.typing import Key, Params

Batch = Mapping[str, jax.Array]
"""tokens, targets, positions int32 and weights float32, all [B, L]."""
