"""The ``optim`` section of a run's configuration."""

import dataclasses
import math
from typing import Literal

from ssm_jax.optim import directions, schedules

NO_DECAY = (
    r"(^|/)A_log$",
    r"(^|/)(Lambda|C)_(real|imag)$",
    r"(^|/)D$",
    r"(^|/)dt_bias$",
    r"(^|/)bias$",
    r"(^|/)scale$",
)
"""Weight decay skips A_log, D and dt_bias (mamba_ssm marks them), Lambda and C (as the DSS code does), every other bias and every
norm. It reaches all kernels, the convolution's included, and the embedding: mamba_ssm marks neither."""


Reset = Literal["zero", "keep", "magnitude", "random", "reference", "reference_random"]


@dataclasses.dataclass(frozen=True)
class ReLoRAConfig:
    """ReLoRA (Lialin et al. 2023, arXiv:2307.05695): frozen matrices W, trained as W + alpha / rank A B, merged again and again.

    Attributes:
        cycle: applied updates from merge to merge; null never merges, which is LoRA.
        rank, alpha: of every low-rank path.
        warm_start: updates of ordinary training that come first. The run's length less these is a whole number of cycles.
        lr: peak rate once low-rank paths train, the whole schedule in proportion; null: ``optim.lr``, as in the warm start.
        select: patterns of parameter paths that narrow the family's default projections (``optim.relora.defaults``); none, all.
        rewarmup: updates over which the rate rises linearly from 0 to the schedule's, after every merge and after a warm start;
            null: a tenth of a cycle, at most 50.
        reset, keep: what of the adapters' optimizer state survives a merge, see ``optim.relora.reset_state``.
        frozen_dtype: "bfloat16" halves the frozen matrices, and every merge rounds; null keeps the parameters' float32.
        master: with ``frozen_dtype``, sum the merges in float32 copies in host memory.
        carry_moments: after a warm start, keep the optimizer's moments of what is trained on as it was.
        dropout: rate on the input of the low-rank paths.
    """

    cycle: int | None
    rank: int = 128
    alpha: float = 32.0
    warm_start: int = 0
    lr: float | None = None
    select: tuple[str, ...] = ()
    rewarmup: int | None = None
    reset: Reset = "zero"
    keep: float | None = None
    frozen_dtype: Literal["bfloat16"] | None = None
    master: bool = False
    carry_moments: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.cycle is not None and self.cycle < 1:
            raise ValueError(f"cycle is {self.cycle}; it must be at least 1 update, or null to merge never")
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise ValueError(f"rank is {self.rank} and alpha {self.alpha}; they must be at least 1, and above 0")
        if self.warm_start < 0 or self.rewarmup_steps < 0:
            raise ValueError(f"warm_start is {self.warm_start} and rewarmup {self.rewarmup}; they must not be negative")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; it must be above 0, or null for that of optim")
        if self.cycle is not None and self.rewarmup_steps >= self.cycle:
            raise ValueError(
                f"rewarmup is {self.rewarmup} and cycle {self.cycle}; the rate must have risen before the next merge, so lower "
                f"rewarmup to at most {self.cycle - 1}"
            )
        if self.master and self.frozen_dtype is None:
            raise ValueError(
                "master is true and frozen_dtype null: the frozen matrices are float32 already; drop master"
            )
        if self.carry_moments and not self.warm_start:
            raise ValueError("carry_moments is true and warm_start 0: there are no moments yet; drop carry_moments")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")

    @property
    def rewarmup_steps(self) -> int:
        """``rewarmup``, or what null stands for."""
        if self.rewarmup is not None:
            return self.rewarmup
        return 50 if self.cycle is None else min(50, self.cycle // 10)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with the published Mamba recipe as default.

    Attributes:
        name: "adamw", "lion", "adafactor" or "muon"; see ``ssm_jax.optim.directions``.
        lr, final_lr: peak and last learning rate. schedule: see ``ssm_jax.optim.schedules``.
        warmup_steps, warmup_ratio: length of the warm-up, in steps or as a part of the total; at most one.
        decay_ratio: the part of a "wsd" schedule, after warm-up, that decays. power: of a "polynomial" one.
        clip_norm: bound of the global gradient norm, null for none.
        no_decay: patterns of parameter paths without weight decay.
        ema: decay of an exponential moving average of the parameters, null for none; evaluation, samples and export use it.
        freeze, train: patterns of parameter paths to freeze, or the only ones to train; at most one of the two.
        max_skipped: updates in a row that may be skipped for non-finite gradients before the run stops.
        relora: train low-rank paths beside frozen matrices; null for ordinary training.
    """

    name: directions.Name = "adamw"
    lr: float = 3e-3
    final_lr: float = 1e-5
    schedule: schedules.Name = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    decay_ratio: float = 0.1
    power: float = 2.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    no_decay: tuple[str, ...] = NO_DECAY
    ema: float | None = None
    freeze: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    max_skipped: int = 10
    relora: ReLoRAConfig | None = None

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; it must be above 0")
        if not (
            0 <= self.final_lr < math.inf and 0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.weight_decay >= 0
        ):
            raise ValueError("final_lr and weight_decay must not be negative, beta1 and beta2 must lie in [0, 1)")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio are both set; keep one")
        if not 0 <= self.warmup_ratio < 1 or self.warmup_steps < 0:
            raise ValueError("warmup_ratio must lie in [0, 1) and warmup_steps must not be negative")
        if not 0 < self.decay_ratio <= 1:
            raise ValueError(f"decay_ratio is {self.decay_ratio}; it must lie in (0, 1]")
        if self.power <= 0:
            raise ValueError(f"power is {self.power}; it must be above 0")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is {self.ema}; it must lie between 0 and 1, or be null for none")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; it must be above 0, or null for no clipping")
        if self.relora is not None and self.ema is not None:
            raise ValueError(
                f"ema is {self.ema} and relora is set, whose adapters start again at every merge, so that their average means "
                "nothing; set one of them to null"
            )
