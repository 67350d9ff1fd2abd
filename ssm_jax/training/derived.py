"""What follows from the parameters alone, computed once per update and not once per microbatch."""

from flax import traverse_util

from ssm_jax import optim
from ssm_jax.models import LanguageModel
from ssm_jax.models.registry import family_of
from ssm_jax.typing import Params


def extended(model: LanguageModel, trainable: Params, frozen: Params, length: int, documents: bool) -> Params:
    """``trainable`` with the leaves that ``Family.derive`` adds for rows of ``length`` tokens; itself for most families.

    A gradient with respect to the result must be pulled back through this function. ``frozen`` is the step's argument, with a
    teacher or without; ``documents``: whether rows come with positions.
    """
    params = optim.merge(trainable, frozen.get("student", frozen))
    known = traverse_util.flatten_dict(params)
    full = traverse_util.flatten_dict(family_of(model.config).derive(model.config, params, length, documents))
    added = traverse_util.unflatten_dict({path: leaf for path, leaf in full.items() if path not in known})
    return optim.merge(trainable, added)
