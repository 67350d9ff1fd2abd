"""ReLoRA (Lialin et al. 2023, arXiv:2307.05695): training at high rank through a sequence of low-rank updates, for any Linen model.

frozen, trainable, spec = relora.split(params, relora.defaults(model.config), rank=128, alpha=32)
wrapped, optimizer = relora.wrap(model, spec), relora.adamw(spec, relora.jagged_cosine(1e-3, total, cycle))

loss(trainable, frozen) uses wrapped.apply({"params": relora.combine(trainable, frozen)}, ...), gradients of trainable only;
where relora.is_due(relora.applied_updates(opt_state), cycle, merges) and relora.accumulator_empty(opt_state):
    frozen, trainable, opt_state, metrics = relora.merge_and_reset(frozen, trainable, opt_state, key, spec=spec)

params = relora.export(frozen, trainable, spec)
"""

from ssm_jax.optim.relora.accounting import Account, account, nbytes, train_flops_per_token
from ssm_jax.optim.relora.constants import (
    ALPHA,
    DROPOUT,
    FLOOR,
    KEEP,
    KEEP_MAGNITUDE,
    KEEP_RANDOM,
    RANK,
    REWARMUP_STEPS,
    REWARMUP_STEPS_PAPER,
    WARM_START_STEPS,
    WARMUP_STEPS,
)
from ssm_jax.optim.relora.defaults import defaults, selection
from ssm_jax.optim.relora.intercept import Wrapped, interception, kernels, wrap
from ssm_jax.optim.relora.merge import factor_shardings, in_host_memory, is_due, merge_and_reset, merge_with_master
from ssm_jax.optim.relora.optimizer import (
    accumulator_empty,
    adamw,
    applied_updates,
    chain,
    count_applied,
    make_optimizer,
    separate_counters,
)
from ssm_jax.optim.relora.placement import adapter_axes, logical_axes, optimizer_axes
from ssm_jax.optim.relora.reset import reset_state
from ssm_jax.optim.relora.schedules import by_name, cyclic_cosine, jagged, jagged_cosine, linear, restarts
from ssm_jax.optim.relora.spec import Kernel, Leaf, Spec, plan
from ssm_jax.optim.relora.transformation import ReLoRAState, as_transformation
from ssm_jax.optim.relora.trees import combine, export, init, materialise, partition, split
from ssm_jax.optim.relora.warm_start import carry_moments, from_full_rank

__all__ = [
    "ALPHA",
    "DROPOUT",
    "FLOOR",
    "KEEP",
    "KEEP_MAGNITUDE",
    "KEEP_RANDOM",
    "RANK",
    "REWARMUP_STEPS",
    "REWARMUP_STEPS_PAPER",
    "WARMUP_STEPS",
    "WARM_START_STEPS",
    "Account",
    "Kernel",
    "Leaf",
    "ReLoRAState",
    "Spec",
    "Wrapped",
    "account",
    "accumulator_empty",
    "adamw",
    "adapter_axes",
    "applied_updates",
    "as_transformation",
    "by_name",
    "carry_moments",
    "chain",
    "combine",
    "count_applied",
    "cyclic_cosine",
    "defaults",
    "export",
    "factor_shardings",
    "from_full_rank",
    "in_host_memory",
    "init",
    "interception",
    "is_due",
    "jagged",
    "jagged_cosine",
    "kernels",
    "linear",
    "logical_axes",
    "make_optimizer",
    "materialise",
    "merge_and_reset",
    "merge_with_master",
    "nbytes",
    "optimizer_axes",
    "partition",
    "plan",
    "reset_state",
    "restarts",
    "selection",
    "separate_counters",
    "split",
    "train_flops_per_token",
    "wrap",
]
