"""Errors meant for the person at the terminal: one sentence that names the file or key, and the fix.

Every one of them is raised before anything is overwritten. Scripts print the sentence and exit with status 2
(see ``ssm_jax.config.main``); tracebacks are for bugs.
"""


class UserError(Exception):
    """Something the user can fix. The message names what is wrong and what to do."""


class ConfigError(UserError):
    """A configuration key or value that cannot be used."""


class DataError(UserError):
    """Input text, a tokenizer or a prepared shard that cannot be read."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, damaged, or of another run."""


class LayoutError(UserError):
    """A weight folder that does not fit: missing, extra or misshapen tensors, or a layout that cannot hold it."""


class ShardingError(UserError):
    """A parameter, batch or state that does not divide over the mesh."""


class ImplementationError(UserError):
    """An op implementation that was asked for by name and cannot run here."""


class GenerationError(UserError):
    """A prompt or a sampling setting that cannot be used."""
