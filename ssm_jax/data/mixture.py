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
    """The same split of several corpora, which agree on tokenizer and row length. ``weights``: shares of the rows."""

    datasets: tuple[PackedDataset, ...]
    weights: tuple[float, ...]

    @property
    def path(self) -> Path:
        """Where the tokenizer lies."""
        return self.datasets[0].path

    @property
    def seq_len(self) -> int:
        return self.datasets[0].seq_len

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


def open_mixture(corpora: Sequence[tuple[str, float]], split: str = "train") -> Mixture:
    """The ``split`` of each corpus, given its folder and weight.

    Raises:
        DataError: see ``open_dataset``; data prepared as documents; corpora with another tokenizer or other rows than the first.
    """
    datasets = tuple(open_dataset(path, split) for path, _ in corpora)
    first = datasets[0].manifest
    if first.form != "rows":
        raise DataError(f"Data {datasets[0].path} was prepared as {first.form}; prepare rows with --form rows.")
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
    return Mixture(datasets, tuple(weight / total for _, weight in corpora))


def open_held_out(corpora: Sequence[tuple[str, float]]) -> Mixture | None:
    """The validation splits of those corpora that have one."""
    found = [(path, weight) for path, weight in corpora if "validation" in read_manifest(path).splits]
    return open_mixture(found, "validation") if found else None


def require_same_tokenizer(data: Mixture, model: str, key: str) -> None:
    """Raises DataError if the folder of a model, the value of the config key ``key``, has another tokenizer than the data."""
    folder = tokenizer_folder(Path(model))
    if folder is not None and load_tokenizer(folder).fingerprint != data.tokenizer.get("fingerprint"):
        raise DataError(
            f"Data {data.path} was prepared with another tokenizer than that of {key}={model}; prepare it with "
            f"--tokenizer {folder}."
        )
