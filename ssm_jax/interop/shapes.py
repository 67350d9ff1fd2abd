"""A model's parameters as shapes."""

import jax
import jax.numpy as jnp

from ssm_jax.models import LanguageModel
from ssm_jax.typing import Params


def abstract_params(model: LanguageModel) -> Params:
    """Shapes and dtypes of the parameters, without allocating any."""
    return dict(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
