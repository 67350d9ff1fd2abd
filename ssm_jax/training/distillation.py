"""What a run minimises when it has a teacher: the data's cross entropy and the divergence from the teacher, in turn or mixed."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ssm_jax import optim, sharding
from ssm_jax.models import LanguageModel
from ssm_jax.ops import linear_cross_entropy, linear_distillation
from ssm_jax.training.config import DistillConfig
from ssm_jax.training.losses import AppliedModel, Batch, Objective, Sums, features, with_gradient
from ssm_jax.training.run import Run
from ssm_jax.typing import Key, Params, PyTree


def fixed(frozen: Params, teacher: Params | None) -> Params:
    """What an update reads and never changes: the ``frozen`` argument of the step, arrays or shapes."""
    return frozen if teacher is None else {"student": frozen, "teacher": teacher}


def objective_of(run: Run, model: AppliedModel) -> Objective | None:
    """The objective of a run with a teacher; None for one without. ``model``: the student as it is applied."""
    if run.teacher is None:
        return None
    parts, microbatches = sharding.batch_parts(run.mesh), run.config.batch.microbatches
    return make_objective(model, run.teacher.model, run.teacher.config, microbatches, parts)


def make_objective(
    student: AppliedModel,
    teacher: LanguageModel,
    config: DistillConfig,
    microbatches: int = 1,
    batch_shards: int = 1,
) -> Objective:
    """CE and KL in turn or mixed, see ``DistillConfig``; ``frozen`` is what ``fixed`` returns.

    The sums hold "ce" and "kl" beside "loss", with the weight of what was computed. In turn, only one of them is computed; the
    teacher runs only for a KL that counts. The student has its dropout in both, the teacher never. No state is carried.
    """

    def weighted(shares: Mapping[str, float]) -> Objective:
        def loss_sum(
            trainable: Params, frozen: Params, batch: Batch, key: Key
        ) -> tuple[Float[Array, ""], tuple[Sums, PyTree]]:
            params = optim.merge(trainable, frozen["student"])
            inputs = features(student, params, batch, key)[0], student.readout(params)
            nothing = jnp.float32(0)
            sums: Sums = {"ce": (nothing, nothing), "kl": (nothing, nothing)}
            if "ce" in shares:
                sums["ce"] = linear_cross_entropy(
                    *inputs, batch["targets"], batch["weights"], batch_shards=batch_shards
                )
            if "kl" in shares:
                sums["kl"] = linear_distillation(
                    *inputs,
                    features(teacher, frozen["teacher"], batch)[0],
                    teacher.readout(frozen["teacher"]),
                    batch["weights"],
                    temperature=config.temperature,
                    vocab_size=student.config.vocab_size,
                    batch_shards=batch_shards,
                )
            loss = sum((share * sums[name][0] for name, share in shares.items()), start=nothing)
            return loss, ({"loss": (loss, jnp.sum(batch["weights"], dtype=jnp.float32)), **sums}, None)

        of_batch = with_gradient(loss_sum)

        def objective(
            trainable: Params, frozen: Params, batch: Batch, key: Key, index: Int[Array, ""], carry: PyTree = None
        ) -> tuple[Sums, Params, PyTree]:
            return of_batch(trainable, frozen, batch, key)

        return objective

    if config.mode == "mix":
        return weighted({"ce": 1 - config.weight} | ({"kl": config.weight} if config.weight else {}))

    cross_entropy, divergence = weighted({"ce": 1.0}), weighted({"kl": 1.0})

    def in_turn(
        trainable: Params, frozen: Params, batch: Batch, key: Key, index: Int[Array, ""], carry: PyTree = None
    ) -> tuple[Sums, Params, PyTree]:
        turn = index if config.unit == "microbatch" else index // microbatches
        return jax.lax.cond(turn % 2 == 1, divergence, cross_entropy, trainable, frozen, dict(batch), key, index, carry)

    return in_turn
