"""The configuration of a training run, and the checks that need nothing but it."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from ssm_jax.config import apply_overrides, from_dict, read_yaml
from ssm_jax.data.schedule import Refill
from ssm_jax.errors import ConfigError
from ssm_jax.optim import OptimConfig
from ssm_jax.sharding import MeshConfig

Every = int | float
"""A number of steps, or (below 1) a part of the whole run; 0 is never."""


def _require_interval(every: Every) -> None:
    if every < 0:
        raise ValueError(f"every is {every}; it must be a number of steps, a part of the run below 1, or 0 for never")


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """One of several corpora. path: its folder. weight: its share of the rows, relative to the others'."""

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight is {self.weight}; it must be above 0")


@dataclasses.dataclass(frozen=True)
class LanesConfig:
    """Whole articles (data prepared with ``--form documents``) instead of rows: each of ``batch.size`` lanes reads one after
    another.

    window: tokens that a lane reads per update. refill: when a lane takes its next article, see ``data.schedule.Schedule``.
    targets: "all", every token of an article but its first; "within_windows", as published for Baka, nor the first of a window.
    shuffle: articles in a new order in every epoch, or in the stored one.
    """

    window: int
    refill: Refill = "stable"
    targets: Literal["all", "within_windows"] = "all"
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"window is {self.window}; it must be at least 2")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Prepared data (``python -m train.prepare_data``).

    path: its folder. mixture: instead, several corpora with weights. seq_len: the rows' length, if you want it checked. seed: of
    the order in which rows are read. joined: read a row as one document, whatever begins in it, as many recipes do; else nothing
    crosses a document start. lanes: read whole articles, not rows.
    """

    path: str | None = None
    mixture: tuple[CorpusConfig, ...] = ()
    seq_len: int | None = None
    seed: int = 0
    joined: bool = False
    lanes: LanesConfig | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (not self.mixture):
            raise ValueError("exactly one of path and mixture must be set")
        if self.lanes is not None and self.mixture:
            raise ValueError("mixture and lanes are set, and lanes read one corpus; set path, or lanes=null")
        if self.lanes is not None and self.joined:
            raise ValueError("joined and lanes are set, and a lane's window holds one article; set one of them")

    @property
    def corpora(self) -> tuple[CorpusConfig, ...]:
        """The mixture; of one corpus where ``path`` is set."""
        return self.mixture if self.path is None else (CorpusConfig(self.path),)


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """size: rows or lanes per update, over all devices and processes. microbatches: parts that are worked on one after another."""

    size: int
    microbatches: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or self.microbatches < 1:
            raise ValueError("size and microbatches must be at least 1")
        if self.size % self.microbatches:
            raise ValueError(
                f"size {self.size} does not divide into {self.microbatches} microbatches; change one of them"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train.

    steps: updates; the schedule ends there. epochs: instead, passes over the data (over so many rows, with a mixture).
    time_budget_s: instead, as many updates as fit into so many seconds, measured once before the first update. max_seconds: stop
    this session after so long, whatever is left; the same command goes on later.
    profile: [first, last] step of which a profiler trace is written to the run's ``profile`` folder.
    carry_state: with ``data.lanes``, a window begins with the recurrent state that the window before it left, detached (truncated
    back-propagation); else every window begins with an empty one.
    accept_changes: resume although model, data, optimizer, batch or seed differ from the saved run.
    """

    steps: int | None = None
    epochs: float | None = None
    time_budget_s: float | None = None
    max_seconds: float | None = None
    profile: tuple[int, int] | None = None
    carry_state: bool = False
    accept_changes: bool = False

    def __post_init__(self) -> None:
        lengths = [name for name in ("steps", "epochs", "time_budget_s") if getattr(self, name) is not None]
        if len(lengths) != 1:
            there = " and ".join(lengths) or "none"
            raise ValueError(
                f"exactly one of steps, epochs and time_budget_s must be set, and {there} is; set the others to null, such as "
                "train.time_budget_s=null"
            )
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(
                f"profile is {list(self.profile)}; it must be the first and the last step to trace, from 1 on"
            )
        for name in ("steps", "epochs", "time_budget_s", "max_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Learning from another model with the same vocabulary, of any family, beside the data.

    CE is the cross entropy with the data's next tokens, KL is temperature^2 KL(teacher || student), both per token.

    teacher: a folder that ``from_pretrained`` reads, a run of ours included. temperature: divides the logits of both sides in KL.
    mode: "alternate" takes CE and KL in turn, "mix" takes (1 - weight) CE + weight KL everywhere.
    unit: what "alternate" counts, from the start of the run: even ones ("microbatch" or "update") take CE, odd ones KL.
    weight: the share of KL in "mix".
    copy_embeddings: begin with the teacher's token embeddings, and with its head where the student has one of its own; with
    ``optim.freeze=["^embed/", "^head/"]`` they stay.
    """

    teacher: str
    mode: Literal["alternate", "mix"] = "alternate"
    unit: Literal["microbatch", "update"] = "microbatch"
    weight: float = 0.5
    temperature: float = 1.0
    copy_embeddings: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        if not 0 <= self.weight <= 1:
            raise ValueError(
                f"weight is {self.weight}; it must lie in [0, 1], 0 for the data alone and 1 for the teacher"
            )
        if self.mode == "alternate" and self.weight != 0.5:
            raise ValueError(
                f"weight is {self.weight} and mode is alternate, which has no weights; set mode=mix, or drop weight"
            )
        if self.mode == "mix" and self.unit != "microbatch":
            raise ValueError(
                f"unit is {self.unit} and mode is mix, which takes no turns; set mode=alternate, or drop unit"
            )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Loss on the validation split. every: see Every; always at the end too. batches: at most so many, null for all."""

    every: Every = 0.1
    batches: int | None = 16

    def __post_init__(self) -> None:
        _require_interval(self.every)
        if self.batches is not None and self.batches < 1:
            raise ValueError(
                f"batches is {self.batches}; it must be at least 1, or null for all (every=0 turns it off)"
            )


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Text written by the model. every: see Every; always at the end too. prompts: one sample each; none, no samples."""

    every: Every = 0.1
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = 0.95

    def __post_init__(self) -> None:
        _require_interval(self.every)
        if self.max_new_tokens < 1 or self.temperature < 0 or (self.top_k is not None and self.top_k < 1):
            raise ValueError("max_new_tokens and top_k must be at least 1, temperature at least 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """every: see Every; always at the end too. keep: how many of the last ones stay, null for all. keep_every: multiples of it stay
    too, null for none."""

    every: Every = 0.25
    keep: int | None = 2
    keep_every: int | None = None

    def __post_init__(self) -> None:
        _require_interval(self.every)
        if self.keep is not None and self.keep < 1:
            raise ValueError("keep must be at least 1, or null to keep all")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError("keep_every must be at least 1, or null")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """every: steps between lines of metrics.jsonl and TensorBoard. tensorboard: write events. wandb: a project of Weights & Biases
    that the same rows go to, null for none."""

    every: int = 1
    tensorboard: bool = True
    wandb: str | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError("every must be at least 1")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything about a run. Model, teacher, data, optim, batch, seed and length are its identity; the rest may change on resume.

    model: ``family`` or ``preset`` or ``base`` (a YAML file with one of these, or null), and any field of the family's config. The
    default ``vocab_size`` is the tokenizer's. init_from: start from the weights of a folder that ``from_pretrained`` reads; then
    ``model`` holds only what should differ from that folder's model.
    """

    output: str
    data: DataConfig
    batch: BatchConfig
    train: TrainConfig
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    init_from: str | None = None
    distill: DistillConfig | None = None
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    seed: int = 0


def load_run_config(path: str | Path | None, overrides: list[str]) -> RunConfig:
    """The config in a YAML file with ``key.sub=value`` overrides applied, every key and type checked.

    Raises:
        ConfigError: see ``ssm_jax.config.from_dict``.
    """
    content = read_yaml(path) if path is not None else {}
    if path is not None and "output" not in content and {"family", "preset"} & set(content):
        raise ConfigError(
            f"{path} is a model section, not a run; name it in one: --config configs/run/demo.yaml model.base={path}."
        )
    content = apply_overrides(content, overrides)
    model = content.get("model")
    if isinstance(model, dict) and model.get("base") is None:
        content["model"] = {key: value for key, value in model.items() if key != "base"}
    elif isinstance(model, dict):
        base = model["base"]
        if not isinstance(base, str):
            raise ConfigError(f"Config key 'model.base' is {base!r}; it must be the path of a YAML file.")
        for key in ("preset", "family"):
            if key in model:
                raise ConfigError(
                    f"Config keys 'model.{key}' ({model[key]!r}) and 'model.base' ({base!r}) are both set; drop one, or set "
                    "model.base=null."
                )
        rest = {key: value for key, value in model.items() if key != "base"}
        content["model"] = {**read_yaml(base), **rest}
    return from_dict(RunConfig, content)


def interval(every: Every, total_steps: int) -> int:
    """``every`` in steps; 0 is never."""
    return max(1, round(every * total_steps)) if 0 < every < 1 else int(every)
