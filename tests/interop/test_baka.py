"""Baka to and from the author's names: every spelling, what weights say and what configs say, refusals."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import LayoutError
from ssm_jax.interop.folder import open_weights
from ssm_jax.interop.layouts import writable
from ssm_jax.interop.pretrained import OURS, open_folder
from ssm_jax.interop.tensor_map import to_tensors
from ssm_jax.models import BakaConfig
from tests.conformance.golden import GOLDENS
from tests.interop.folders import assert_same, copy_golden, random_params

CELP18, EVERY2, STEPS = "baka/celp18_lanes", "baka/mamba_every2_rmt_tail", "baka/steps_gated"
SHAPE: dict[str, Any] = {
    "vocab_size": 61, "d_model": 32, "n_heads": 2, "d_attn": 32, "n_ctx": 16, "n_pauses": 4, "n_rmt_tokens": 4
}  # fmt: skip
GOLDEN_CONFIGS = {
    CELP18: BakaConfig(**SHAPE, n_layers=2, d_mlp=64, rmt_read="head"),
    EVERY2: BakaConfig(**SHAPE, n_layers=3, d_mlp=48, mamba_every=2),
    STEPS: BakaConfig(
        **{**SHAPE, "n_rmt_tokens": 0}, n_layers=3, d_mlp=48, mamba_every=0, xl_layer="below", norm="rms", norm_eps=1e-6,
        gate="relu", step="nstep4",
    ),
}  # fmt: skip
TINY: dict[str, Any] = {"vocab_size": 13, "d_model": 8, "n_heads": 2, "n_ctx": 8, "n_pauses": 2, "n_rmt_tokens": 2}
CONFIGS = {
    "celp18": BakaConfig(**TINY, n_layers=2, rmt_read="head"),
    "every_third_of_eight": BakaConfig(**TINY, n_layers=8, d_mlp=12, mamba_every=3, d_state=5, dt_rank=2),
    "mamba_in_the_first_alone": BakaConfig(**TINY, n_layers=3, mamba_every=9, gate="relu", xl_layer="same"),
    "not_as_its_weights_look": BakaConfig(
        **TINY, n_layers=2, mamba_every=0, norm="rms", norm_eps=1e-3, gate="sigmoid", gate_input="y-x", step="step4",
        step_reach="xl", xl_layer="none", rmt_read="head", elephant_width=0.5, elephant_power=4.0, rope_base=50.0,
        chunk_boundary="call", tie_embeddings=True,
    ),
    "shared_step": BakaConfig(
        **TINY, n_layers=3, mamba_every=2, step="nstep4", step_shared=True, gate="leaky_relu", d_attn=12, mamba_carry=True,
        d_conv=3, expand=1, residual_in_fp32=False, act="silu", dropout=0.1, init="kaiming_normal", remat="full",
        pad_vocab_size_multiple=8,
    ),
    "without_all": BakaConfig(
        **{**TINY, "n_pauses": 0, "n_rmt_tokens": 0}, n_layers=2, mamba_every=0, xl_layer="below", norm_eps=1e-6
    ),
}  # fmt: skip
TRAINING = {"d_mlp", "d_attn", "init", "remat", "vocab_size", "pad_vocab_size_multiple"}
"""Fields that change no logit of given weights, or that weights say."""


def renamed(folder: str, target: Path, rename: Callable[[str], str | None]) -> Path:
    """A golden with other names; None leaves a tensor out."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        changed = {new: x for name, x in tensors.items() if (new := rename(name)) is not None}
        tensors.clear()
        tensors.update(changed)

    folder_of_target = copy_golden(folder, target, tensors=change)
    (target / "weights.safetensors").unlink()
    return folder_of_target


@pytest.mark.parametrize("folder", GOLDEN_CONFIGS)
def test_goldens_are_recognised(folder: str) -> None:
    source = open_folder(GOLDENS / folder)
    assert source.layout.name == ("bakallm_celp18" if folder == CELP18 else "bakallm")
    assert source.model.config == GOLDEN_CONFIGS[folder]
    assert not any("rot.freqs" in name for name in source.tensors)


SPELLINGS: dict[str, Callable[[str], str | None]] = {
    "compiled": lambda name: "_orig_mod." + re.sub(r"\.(mlp|attn)\.", r".\1._orig_mod.", name),
    "not_compiled": lambda name: name.replace("_orig_mod.", ""),
    "joined": lambda name: name.replace("_orig_mod.", "").replace("qkv_prep.", ""),
    "without_angles": lambda name: None if "rot.freqs" in name else name,
}


@pytest.mark.parametrize("folder", GOLDEN_CONFIGS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_model(folder: str, spelling: str, tmp_path: Path) -> None:
    model, params = ssm_jax.from_pretrained(GOLDENS / folder)
    again, read = ssm_jax.from_pretrained(renamed(folder, tmp_path / "m", SPELLINGS[spelling]))
    assert again.config == model.config
    assert_same(read, params)


def test_names_of_one_branch_with_the_memory_of_another(tmp_path: Path) -> None:
    """Names tell the branch; what the config says stands."""
    plain = {"mamba.mamba.": "mamba.", "mamba.norm_in.": "norm_mamba."}
    folder = renamed(
        CELP18, tmp_path / "m", lambda name: re.sub(r"mamba\.(mamba|norm_in)\.", lambda found: plain[found[0]], name)
    )
    assert open_folder(folder).model.config.rmt_read == "tail"
    assert open_folder(folder, rmt_read="head").model.config == GOLDEN_CONFIGS[CELP18]
    said = copy_golden(CELP18, tmp_path / "said", lambda config: config.update(rmt_read="tail", xl_layer="below"))
    config = open_folder(said).model.config
    assert (config.rmt_read, config.xl_layer) == ("tail", "below")


@pytest.mark.parametrize("folder", GOLDEN_CONFIGS)
def test_what_the_config_leaves_out_is_the_weights(folder: str, tmp_path: Path) -> None:
    """All but what they do not show: heads, and the size of chunks."""

    def strip(config: dict[str, Any]) -> None:
        for key in set(config) - {"model_type", "n_heads", "n_ctx", "n_pauses"}:
            del config[key]

    model, params = ssm_jax.from_pretrained(copy_golden(folder, tmp_path / "m", strip))
    assert model.config == GOLDEN_CONFIGS[folder]
    assert_same(params, ssm_jax.from_pretrained(GOLDENS / folder)[1])


@pytest.mark.parametrize("folder", GOLDEN_CONFIGS)
def test_a_config_without_a_model_type(folder: str, tmp_path: Path) -> None:
    found = copy_golden(folder, tmp_path / "m", lambda config: config.pop("model_type"))
    assert open_folder(found).model.config == GOLDEN_CONFIGS[folder]


def test_widths_of_zero_are_the_authors_defaults(tmp_path: Path) -> None:
    config = open_folder(copy_golden(CELP18, tmp_path / "m", lambda c: c.update(dim_ff=0, dim_attn=0))).model.config
    assert (config.d_mlp, config.d_attn) == (None, None)


@pytest.mark.parametrize("name", CONFIGS)
def test_export_then_import_is_bit_identical(name: str, tmp_path: Path) -> None:
    """And config.json alone says what the model computes, whatever its weights look like."""
    config = CONFIGS[name]
    model = ssm_jax.build(config)
    params = random_params(model)
    ssm_jax.save_pretrained(model, params, tmp_path / "m", check=False)
    again, read = ssm_jax.from_pretrained(tmp_path / "m")
    assert again.config == config
    assert_same(read, params)
    (tmp_path / "m" / OURS).unlink()
    alone = open_folder(tmp_path / "m").model.config
    differing = {key for key in vars(config) if getattr(alone, key) != getattr(config, key)}
    assert differing <= TRAINING


@pytest.mark.parametrize(("folder", "layout"), [(CELP18, "bakallm_celp18"), (EVERY2, "bakallm"), (STEPS, "bakallm")])
def test_folders_are_written_as_they_were_read(folder: str, layout: str, tmp_path: Path) -> None:
    """Every name and bit, angles included; the author's keys too."""
    model, params = ssm_jax.from_pretrained(GOLDENS / folder, chunk_boundary="call")
    ssm_jax.save_pretrained(model, params, tmp_path / "m", layout, check=False)
    written, golden = (
        {name: np.array(tensor.load()) for name, tensor in open_weights(root).items()}
        for root in (tmp_path / "m", GOLDENS / folder)
    )
    assert set(written) == set(golden)
    for name, value in golden.items():
        if name.endswith("rot.freqs"):
            np.testing.assert_allclose(written[name], value, rtol=1e-6, strict=True)
        else:
            np.testing.assert_array_equal(written[name], value, err_msg=name, strict=True)
    content, original = (json.loads((root / "config.json").read_text()) for root in (tmp_path / "m", GOLDENS / folder))
    shared = {key for key in original if key in content} - ({"model_type"} if layout == "bakallm" else set())
    assert {key: content[key] for key in shared} == {key: original[key] for key in shared}
    assert set(original) - shared <= {
        "n_rmt_margins",
        "rmt_solidifier",
        "use_flash_attn",
        "is_pause_pos_random",
        "model_type",
    }
    again, read = ssm_jax.from_pretrained(tmp_path / "m")
    assert again.config == model.config
    assert_same(read, params)


def test_the_report_names_the_layers_of_each_stack(tmp_path: Path) -> None:
    model = ssm_jax.build(CONFIGS["every_third_of_eight"])
    ssm_jax.save_pretrained(model, random_params(model), tmp_path / "m", check=False)
    tensors = json.loads((tmp_path / "m" / "parity.json").read_text())["tensors"]
    assert tensors["model.layers.{i:1+6}.mamba.A_log"] == tensors["model.layers.{i:3+0}.mamba.A_log"] == [16, 5]
    assert tensors["model.layers.{i:3+1}.attn.q.weight"] == [8, 8]
    assert not any("mamba" in name and "3+1" in name for name in tensors)


def test_the_row_of_a_tensor_is_one_of_its_layer() -> None:
    """Layers of different stacks: each tensor of layer i is made of its leaf."""
    model = ssm_jax.build(CONFIGS["every_third_of_eight"])
    params = random_params(model)
    tensors = to_tensors(writable("baka", None).tensors_of(model.config), params)
    for i in range(8):
        stack, j = ("units", i // 3) if i < 6 else ("rest", 0)
        leaves = params["layers"][stack][f"members_{i % 3}"]
        name = f"model.layers.{i}."
        np.testing.assert_array_equal(
            tensors[name + "mlp.fc_up.weight"].load(), np.asarray(leaves["mlp"]["up_proj"]["kernel"][j]).T
        )
        assert (name + "mamba.D" in tensors) == (i % 3 == 0)


@pytest.mark.parametrize(
    ("folder", "change", "message"),
    [
        (CELP18, lambda c: c.pop("n_heads"), r"'n_heads' is missing in config\.json"),
        (CELP18, lambda c: c.update(act_fn="gelu"), r"'act_fn' is 'gelu'; ssm_jax has elephant, elephant18_fast, silu"),
        (
            EVERY2,
            lambda c: c.update(is_pause_pos_random=True),
            r"'is_pause_pos_random' is True; ssm_jax has only False",
        ),
        (EVERY2, lambda c: c.update(use_flash_attn=False), r"'use_flash_attn' is False; ssm_jax has only True"),
        (EVERY2, lambda c: c.update(rmt_solidifier="glu"), r"'rmt_solidifier' is 'glu'; ssm_jax has only 'none'"),
        (EVERY2, lambda c: c.update(n_ctx="long"), r"'n_ctx' is 'long'; it must be an integer"),
        (EVERY2, lambda c: c.update(mamba_each_nth_layer=1), r"missing: model\.layers\.1\.norm_mamba\.weight"),
        (EVERY2, lambda c: c.update(dim_ff=40), r"of another shape: model\.layers\.0\.mlp\.fc_gate\.weight \[48, 32\]"),
        (STEPS, lambda c: c.update(gate="none"), r"left over: .*attn\.base"),
    ],
)
def test_configs_that_do_not_fit_are_named(
    folder: str, change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LayoutError, match=message):
        ssm_jax.from_pretrained(copy_golden(folder, tmp_path / "m", change))


@pytest.mark.parametrize(
    ("folder", "rename", "message"),
    [
        (
            CELP18,
            lambda name: None if name.endswith("1.mamba.mamba.D") else name,
            r"missing: model\.layers\.1\.mamba\.D",
        ),
        (EVERY2, lambda name: None if "pause_emb" in name else name, r"missing: model\.pause\.pause_emb"),
        (
            STEPS,
            lambda name: name.replace("2.step_forward.fc_gate", "2.gate"),
            r"missing: .*2\.step_forward\.fc_gate.*left",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    folder: str, rename: Callable[[str], str | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LayoutError, match=message):
        ssm_jax.from_pretrained(renamed(folder, tmp_path / "m", rename))


def test_a_tensor_in_two_spellings_is_named(tmp_path: Path) -> None:
    def twice(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.attn.q.weight"] = tensors["model.layers.0.attn.qkv_prep._orig_mod.q.weight"]

    folder = copy_golden(CELP18, tmp_path / "m", tensors=twice)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(LayoutError, match=r"holds 'model\.layers\.0\.attn\.q\.weight' twice"):
        ssm_jax.from_pretrained(folder)


def test_weights_under_the_config_of_another_family_are_recognised(tmp_path: Path) -> None:
    folder = copy_golden(CELP18, tmp_path / "m")
    (folder / "config.json").write_text('{"num_tokens": 61, "dim": 32, "depth": 2}')
    with pytest.raises(LayoutError, match="read as gss .* The tensors look like baka in the layout 'bakallm'"):
        ssm_jax.from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rmt_read": "tail"},
            "rmt_read is 'tail' and not 'head'. Use the layout 'bakallm'",
        ),
        ({"mamba_every": 2}, "mamba_every is 2 and not 1"),
        ({"elephant_power": 4.0}, r"elephant_power is 4\.0 and not 8\.0"),
        ({"tie_embeddings": True}, "tie_embeddings is True and not False"),
        ({"n_pauses": 0}, "n_pauses is 0"),
    ],
)
def test_what_the_branch_does_not_compute_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = ssm_jax.build(CONFIGS["celp18"], **fields)
    with pytest.raises(LayoutError, match=message):
        ssm_jax.save_pretrained(model, random_params(model), tmp_path / "m", "bakallm_celp18", check=False)
    assert not (tmp_path / "m").exists()
