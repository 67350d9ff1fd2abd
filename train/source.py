"""What the scripts start from: a model, its parameters and its tokenizer, from one folder."""

from pathlib import Path

from ssm_jax.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_folder
from ssm_jax.errors import DataError
from ssm_jax.interop import from_pretrained
from ssm_jax.models import LanguageModel
from ssm_jax.typing import Params


def load(path: str, dtype: str | None = None) -> tuple[LanguageModel, Params, Tokenizer]:
    """Reads a run folder, a checkpoint in one, or any folder that ``from_pretrained`` reads, with its tokenizer.

    Raises:
        UserError: no such folder, no weights, no tokenizer, or a tokenizer with more ids than the model.
    """
    if not Path(path).is_dir():
        raise DataError(f"Model folder {path} does not exist; give a run folder or a folder with exported weights.")
    tokenizer = load_tokenizer(tokenizer_folder(Path(path)) or path)
    model, params = from_pretrained(path, dtype=dtype)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise DataError(
            f"The tokenizer beside {path} has {tokenizer.vocab_size} ids and the model {model.config.vocab_size}; "
            "put the model's own tokenizer there."
        )
    return model, params, tokenizer
