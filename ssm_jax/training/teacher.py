"""The model that a run learns from: found, checked against the run, and loaded; its embeddings as the student's first ones."""

import dataclasses
from typing import Any

from jax.sharding import Mesh
from jaxtyping import Array, Float

from ssm_jax import sharding
from ssm_jax.data.mixture import Mixture, require_same_tokenizer
from ssm_jax.errors import ConfigError, UserError
from ssm_jax.interop import fingerprint, from_pretrained, model_of
from ssm_jax.interop.shapes import abstract_params
from ssm_jax.models import LanguageModel, build, config_from_dict, count_parameters
from ssm_jax.models.registry import context_limit, family_name, restarts_within_calls
from ssm_jax.training.config import DistillConfig
from ssm_jax.typing import Params, PyTree

Tables = tuple[Float[Array, "V D"], Float[Array, "D V"]]
"""Token embeddings and readout of a model."""


@dataclasses.dataclass(frozen=True)
class Teacher:
    """config: how it teaches. model: computes in the student's type. fingerprint: of its weights and its model, not of its path."""

    config: DistillConfig
    model: LanguageModel
    fingerprint: str

    def describe(self) -> str:
        """``taught by mamba2 with 1,234 parameters``."""
        config = self.model.config
        return f"taught by {family_name(config)} with {count_parameters(config):,} parameters"


def open_teacher(config: DistillConfig, student: LanguageModel, data: Mixture, joined: bool = False) -> Teacher:
    """The teacher of a run; its weights are read for their fingerprint and not kept.

    Raises:
        LayoutError, CheckpointError: no folder that ``from_pretrained`` reads. DataError: another tokenizer than the data's.
        ConfigError: another vocabulary than the student's; a context shorter than the rows; ``copy_embeddings`` of another width.
    """
    path = config.teacher
    try:
        fields = model_of(path)
        mark = fingerprint(path)
    except UserError as error:
        raise type(error)(f"Config key 'distill.teacher': {error}") from error
    require_same_tokenizer(data, path, "distill.teacher")
    model = build(config_from_dict({**fields, "dtype": student.config.dtype}))
    ours, theirs = student.config.vocab_size, model.config.vocab_size
    if ours != theirs:
        raise ConfigError(
            f"Config key 'distill.teacher': the model in {path} has {theirs} token ids and this run's {ours}; both need the same "
            f"vocabulary: prepare the data with the teacher's tokenizer and set model.vocab_size={theirs}."
        )
    limit = context_limit(model.config)
    if limit is not None and data.seq_len > limit:
        raise ConfigError(
            f"Config key 'distill.teacher': the model in {path} reads at most {limit} tokens and the data in {data.path} has "
            f"rows of {data.seq_len}; prepare the data with --seq-len {limit}, or name a teacher that reads longer rows."
        )
    if data.window is None and not joined and not restarts_within_calls(model.config):
        raise ConfigError(
            f"Config key 'distill.teacher': the {family_name(model.config)} model in {path} begins a document only with a call, "
            f"and rows in {data.path} hold several; set data.joined=true, or name another teacher."
        )
    ours, theirs = (abstract_params(each)["embed"]["embedding"].shape[1] for each in (student, model))
    if config.copy_embeddings and ours != theirs:
        raise ConfigError(
            f"Config key 'distill.copy_embeddings': the embeddings in {path} are {theirs} wide and this run's {ours}; set "
            f"model.d_model={theirs}, or distill.copy_embeddings=false."
        )
    return Teacher(config, model, mark)


def load_teacher(teacher: Teacher | None, mesh: Mesh) -> Params | None:
    """Its parameters in the type they are stored in, each leaf placed on the mesh like a trained one as it is read.

    Raises:
        LayoutError, CheckpointError: damaged weights. ShardingError: a parameter that does not divide over the mesh.
    """
    if teacher is None:
        return None

    def place(shapes: PyTree) -> PyTree:
        return sharding.shardings(shapes, mesh)

    try:
        return from_pretrained(teacher.config.teacher, shardings=place)[1]
    except UserError as error:
        raise type(error)(f"Config key 'distill.teacher': {error}") from error


def tables_for(teacher: Teacher | None, params: Params | None) -> Tables | None:
    """The tables that a student begins with; None where it begins with its own."""
    if teacher is None or params is None or not teacher.config.copy_embeddings:
        return None
    return params["embed"]["embedding"], teacher.model.readout(params)


def with_tables(params: Params, tables: Tables) -> Params:
    """``params`` with the token embeddings of ``tables``, and with their readout where it has a head of its own.

    The rows that both have are copied, those that are no tokens included: a head has learned to keep them improbable. The student's
    further rows stay as they are.
    """
    embedding_VD, readout_DV = tables

    def over(own: Array, new: Array) -> Array:
        shared = tuple(slice(min(sizes)) for sizes in zip(own.shape, new.shape, strict=True))
        return own.at[shared].set(new[shared].astype(own.dtype))

    copied: dict[str, Any] = {"embed": {"embedding": over(params["embed"]["embedding"], embedding_VD)}}
    if "head" in params:
        copied["head"] = {"kernel": over(params["head"]["kernel"], readout_DV)}
    return {**params, **{name: {**params[name], **leaves} for name, leaves in copied.items()}}
