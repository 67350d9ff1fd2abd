"""What ReLoRA saves, by arithmetic over the shapes."""

import dataclasses
import math
from typing import Any

import jax

from ssm_jax.models import flops_per_token
from ssm_jax.optim.relora.spec import Spec
from ssm_jax.optim.relora.trees import flat
from ssm_jax.typing import Params, PyTree


@dataclasses.dataclass(frozen=True)
class Account:
    """Numbers of parameters. wrapped: in the frozen kernels. adapters: in A and B. other: trained in full."""

    wrapped: int
    adapters: int
    other: int

    @property
    def trainable(self) -> int:
        return self.adapters + self.other

    @property
    def total(self) -> int:
        """Of the model as it was."""
        return self.wrapped + self.other

    def full_rank_bytes(self, param: int = 4, gradient: int = 4, moment: int = 4) -> int:
        """(b_p + b_g + 2 b_s) (P_w + P_o): parameters, gradients and Adam's moments of ordinary training."""
        return (param + gradient + 2 * moment) * self.total

    def bytes(self, frozen: int = 4, param: int = 4, gradient: int = 4, moment: int = 4) -> int:
        """b_f P_w + (b_p + b_g + 2 b_s) (P_o + P_l): the same of ReLoRA."""
        return frozen * self.wrapped + (param + gradient + 2 * moment) * self.trainable

    def argument_bytes(self, frozen: int = 4, param: int = 4, moment: int = 4) -> int:
        """b_f P_w + (b_p + 2 b_s) (P_o + P_l): what a compiled step takes, beside the batch and some counters."""
        return frozen * self.wrapped + (param + 2 * moment) * self.trainable


def account(params: Params, spec: Spec) -> Account:
    """Of the parameters (arrays or shapes) that ``spec`` was planned for."""
    kernels = {leaf.path for leaf in spec.leaves}
    other = sum(math.prod(leaf.shape) for path, leaf in flat(params).items() if path not in kernels)
    shapes = [shape for leaf in spec.leaves for shape in (leaf.a_shape(spec.rank), leaf.b_shape(spec.rank))]
    return Account(sum(math.prod(leaf.shape) for leaf in spec.leaves), sum(map(math.prod, shapes)), other)


def train_flops_per_token(config: Any, spec: Spec, context: int) -> float:
    """Operations of a training step per token: those of full-rank training, 3 forward passes, less 2 P_w, the weight gradients that
    are not formed, and with 6 P_l of the adapters. The products with weights alone: 4 P_w + 6 P_l + 6 x (head)."""
    wrapped = sum(math.prod(leaf.shape) for leaf in spec.leaves)
    adapters = sum(math.prod(leaf.a_shape(spec.rank)) + math.prod(leaf.b_shape(spec.rank)) for leaf in spec.leaves)
    return 3 * flops_per_token(config, context) - 2.0 * wrapped + 6.0 * adapters


def nbytes(*trees: PyTree) -> int:
    """Of all leaves, arrays or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))
