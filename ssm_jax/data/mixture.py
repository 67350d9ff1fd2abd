"""One or several prepared corpora as the data of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssm_jax.data.shards import PackedDataset, open_dataset, read_manifest
from ssm_jax.data.tokenizers import load_tokenizer, tokenizer_folder
from ssm_jax.errors import DataError


@dataclass(frozen=True)
class Mixture:
    """The same split of several corpora, which agree on tokenizer and row length. ``weights``: shares of the rows. ``window``: what
    lanes read at a time, where the data is whole documents."""

    datasets: tuple[PackedDataset, ...]
    weights: tuple[float, ...]
    window: int | None = None

    @property
    def path(self) -> Path:
        """Where the tokenizer lies."""
        return self.datasets[0].path

    @property
    def seq_len(self) -> int:
        """Tokens in a row of a batch."""
        return self.datasets[0].seq_len if self.window is None else self.window

    @property
    def vocab_size(self) -> int:
        return self.datasets[0].vocab_size

    @property
    def tokenizer(self) -> dict[str, Any]:
        """Kind, end-of-text id and fingerprint."""
        return self.datasets[0].manifest.tokenizer

    @property
    def rows(self) -> int:
        return sum(dataset.rows for dataset in self.datasets)


def open_mixture(corpora: Sequence[tuple[str, float]], split: str = "train", window: int | None = None) -> Mixture:
    """The ``split`` of each corpus, given its folder and weight: rows, or with a ``window`` documents for lanes.

    Raises:
        DataError: see ``open_dataset``; data prepared in the other form; corpora with another tokenizer or other rows than the
            first.
    """
    datasets = tuple(open_dataset(path, split) for path, _ in corpora)
    first = datasets[0].manifest
    if first.form != "rows" and window is None:
        raise DataError(
            f"Data {datasets[0].path} was prepared as {first.form}; prepare rows with --form rows, or set data.lanes.window to "
            "read whole articles in lanes."
        )
    if first.form != "documents" and window is not None:
        raise DataError(
            f"Data {datasets[0].path} was prepared as {first.form}, and data.lanes reads whole articles; prepare it with --form "
            "documents, or set data.lanes=null."
        )
    for dataset in datasets[1:]:
        manifest = dataset.manifest
        if manifest.tokenizer.get("fingerprint") != first.tokenizer.get("fingerprint"):
            raise DataError(
                f"Data {dataset.path} and {datasets[0].path} were prepared with different tokenizers; prepare one of them again."
            )
        if (manifest.form, manifest.seq_len) != (first.form, first.seq_len):
            raise DataError(
                f"Data {dataset.path} has {manifest.form} of {manifest.seq_len} tokens and {datasets[0].path} {first.form} of "
                f"{first.seq_len}; prepare one of them again."
            )
    total = sum(weight for _, weight in corpora)
    return Mixture(datasets, tuple(weight / total for _, weight in corpora), window)


def open_held_out(corpora: Sequence[tuple[str, float]], window: int | None = None) -> Mixture | None:
    """The validation splits of those corpora that have one."""
    found = [(path, weight) for path, weight in corpora if "validation" in read_manifest(path).splits]
    return open_mixture(found, "validation", window) if found else None


def require_same_tokenizer(data: Mixture, model: str, key: str) -> None:
    """Raises DataError if the folder of a model, the value of the config key ``key``, has another tokenizer than the data."""
    folder = tokenizer_folder(Path(model))
    if folder is not None and load_tokenizer(folder).fingerprint != data.tokenizer.get("fingerprint"):
        raise DataError(
            f"Data {data.path} was prepared with another tokenizer than that of {key}={model}; prepare it with "
            f"--tokenizer {folder}."
        )
