"""A fingerprint follows the weights and the model, not the folder's place."""

import shutil
from pathlib import Path

import jax
import pytest

import ssm_jax
from ssm_jax.errors import LayoutError
from ssm_jax.interop import fingerprint
from tests.interop.folders import random_params


@pytest.mark.parametrize("layout", ["transformers", "mamba_ssm", "ssm_jax"])
def test_is_that_of_the_content(tmp_path: Path, layout: str) -> None:
    model = ssm_jax.build("mamba", vocab_size=24, d_model=8, n_layers=1)
    params = random_params(model)

    def save(name: str, model: ssm_jax.models.LanguageModel, params: ssm_jax.typing.Params) -> str:
        ssm_jax.save_pretrained(model, params, tmp_path / name, layout=layout, check=False)
        return fingerprint(tmp_path / name)

    first = save("first", model, params)
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == first == fingerprint(str(tmp_path / "first"))
    one_weight = jax.tree.map(lambda x: x, params)
    one_weight["norm_f"] = {"scale": params["norm_f"]["scale"].at[3].add(1e-3)}
    another_model = ssm_jax.build(model.config, dropout=0.1)
    assert len({first, save("weight", model, one_weight), save("model", another_model, params)}) == 3


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="holds no weights"):
        fingerprint(tmp_path)
