"""Folders of weights in and out: bit-identical, streamed, complete or not at all."""

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors.numpy import load_file

import ssm_jax
from ssm_jax.errors import ConfigError, LayoutError
from ssm_jax.interop import pretrained
from ssm_jax.interop.layouts import LAYOUTS
from ssm_jax.interop.torch_file import read_torch, write_torch
from ssm_jax.models import (
    BakaConfig,
    DenseMambaConfig,
    DenseRetNetConfig,
    GPT2Config,
    GPTNeoXConfig,
    GSSConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    RetNetConfig,
)
from tests.conformance.golden import GOLDENS
from tests.interop.folders import as_tensors, assert_same, copy_golden, random_params

TIED, UNTIED = "mamba/tied_defaults", "mamba/untied_biases_k3"
ORIGINAL_TIED = "mamba_original/tied_padded_vocab"
EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"
UNUSUAL = {
    "mamba": MambaConfig(
        vocab_size=91, d_model=16, n_layers=3, d_state=3, dt_scale=0.5, bias=True, remat="full", chunk_size=8, dt_rank=3
    ),
    "mamba2": Mamba2Config(
        vocab_size=91,
        d_model=16,
        n_layers=2,
        d_state=4,
        headdim=8,
        ngroups=2,
        dt_limit=(0.0, 0.5),
        A_init_range=(1.0, 2.0),
        conv_bias=False,
        tie_embeddings=False,
        dtype="bfloat16",
        chunk_size=32,
    ),
    "gss": GSSConfig(
        vocab_size=91,
        d_model=16,
        n_layers=2,
        dim_expansion_factor=1.7,
        dss_kernel_N=6,
        dss_kernel_H=8,
        final_norm=True,
        tie_embeddings=True,
        init="slow",
        memory=50,
        accurate=True,
        dtype="bfloat16",
        dropout=0.25,
        chunk_size=8,
    ),
    "gpt2": GPT2Config(
        vocab_size=91,
        d_model=16,
        n_layers=2,
        n_heads=2,
        n_positions=20,
        d_mlp=24,
        activation="silu",
        dropout=0.25,
        residual_in_fp32=False,
        pad_vocab_size_multiple=8,
        dtype="bfloat16",
        remat="full",
    ),
    "dense_mamba": DenseMambaConfig(
        vocab_size=91, d_model=16, n_layers=3, d_state=4, gate_ratio=4, projection="linear", dtype="bfloat16"
    ),
    "retnet": RetNetConfig(
        vocab_size=91,
        d_model=16,
        n_layers=2,
        n_heads=2,
        d_value=24,
        d_mlp=20,
        embedding_norm=True,
        trained_normaliser="abs_sum",
        pad_vocab_size_multiple=8,
        chunk_size=8,
    ),
    "dense_retnet": DenseRetNetConfig(
        vocab_size=91, d_model=64, n_layers=3, n_heads=2, dropout=0.25, pad_vocab_size_multiple=8, dtype="bfloat16"
    ),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=91,
        d_model=16,
        n_layers=2,
        n_heads=2,
        n_positions=20,
        rotary_fraction=0.5,
        parallel_residual=False,
        activation="silu",
        dropout=0.25,
        pad_vocab_size_multiple=8,
        dtype="bfloat16",
    ),
    "llama": LlamaConfig(
        vocab_size=91,
        d_model=16,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        n_positions=20,
        d_mlp=24,
        rope_base=77.0,
        attention_bias=True,
        dropout=0.25,
        pad_vocab_size_multiple=8,
        dtype="bfloat16",
    ),
    "baka": BakaConfig(
        vocab_size=91,
        d_model=16,
        n_layers=4,
        n_heads=2,
        d_mlp=24,
        n_ctx=8,
        n_pauses=2,
        n_rmt_tokens=2,
        gate="sigmoid",
        mamba_every=3,
        dropout=0.25,
        init="kaiming_normal",
        pad_vocab_size_multiple=8,
        dtype="bfloat16",
        chunk_size=8,
    ),
}


UNUSUAL_IN: dict[str, Any] = {
    "fla": replace(UNUSUAL["retnet"], embedding_norm=False, rotary="halves", norm_scale=True, score_scale=False),
    "bakallm_celp18": replace(UNUSUAL["baka"], gate="none", mamba_every=1, rmt_read="head"),
}
"""Where a layout has other models of its family than the rest."""


def small(**fields: Any) -> tuple[ssm_jax.models.LanguageModel, Any]:
    model = ssm_jax.build("mamba", **({"vocab_size": 24, "d_model": 16, "n_layers": 2, "d_state": 4} | fields))
    return model, random_params(model)


WRITABLE = [(row.family, row.name) for row in LAYOUTS if row.write_files] + [(family, "ssm_jax") for family in UNUSUAL]


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "layout"), WRITABLE)
def test_export_then_import_is_bit_identical(tmp_path: Path, family: str, param_dtype: str, layout: str) -> None:
    model = ssm_jax.build(UNUSUAL_IN.get(layout, UNUSUAL[family]), param_dtype=param_dtype)
    params = random_params(model)
    ssm_jax.save_pretrained(model, params, tmp_path / "m", layout, check=False)
    again, read = ssm_jax.from_pretrained(tmp_path / "m")
    assert again.config == model.config
    assert_same(read, params)


def test_exported_values_are_the_golden_ones_under_the_golden_names(tmp_path: Path) -> None:
    for family, folder in (("transformers", TIED), ("transformers", UNTIED), ("transformers", "mamba2/one_group")):
        model, params = ssm_jax.from_pretrained(GOLDENS / folder)
        ssm_jax.save_pretrained(model, params, tmp_path / folder, family, check=False)
        written, golden = (load_file(root / folder / "model.safetensors") for root in (tmp_path, GOLDENS))
        assert set(written) == set(golden)
        for name, value in golden.items():
            np.testing.assert_array_equal(written[name], value, err_msg=name, strict=True)


@pytest.mark.parametrize("name", [TIED, ORIGINAL_TIED, "mamba2/one_group"])
def test_float16_weights_are_read_as_float32(name: str, tmp_path: Path) -> None:
    def halve(arrays: dict[str, np.ndarray]) -> None:
        arrays.update({key: array.astype(np.float16) for key, array in arrays.items()})

    _, exact = ssm_jax.from_pretrained(GOLDENS / name)
    model, params = ssm_jax.from_pretrained(
        copy_golden(name, tmp_path / "m", lambda config: config.update(dtype="float16"), halve)
    )
    assert (model.config.dtype, model.config.param_dtype) == ("float32", "float32")
    assert_same(params, jax.tree.map(lambda leaf: leaf.astype(jnp.float16).astype(jnp.float32), exact))


def test_a_tied_head_is_stored_once_or_shared(tmp_path: Path) -> None:
    model, params = small()
    ssm_jax.save_pretrained(model, params, tmp_path / "hf", "transformers", check=False)
    assert HEAD not in load_file(tmp_path / "hf" / "model.safetensors")
    ssm_jax.save_pretrained(model, params, tmp_path / "original", "mamba_ssm", check=False)
    weights = read_torch(tmp_path / "original" / "pytorch_model.bin")
    np.testing.assert_array_equal(weights[HEAD].load(), weights["backbone.embedding.weight"].load())


def test_the_files_of_an_exported_folder(tmp_path: Path) -> None:
    model, params = small(vocab_size=19)
    ssm_jax.save_pretrained(model, params, tmp_path / "m", check=False)
    names = {"config.json", "generation_config.json", "model.safetensors", "parity.json", "ssm_jax.json"}
    assert {path.name for path in (tmp_path / "m").iterdir()} == names
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"] == ["MambaForCausalLM"]
    assert (config["vocab_size"], config["dtype"], config["time_step_rank"]) == (24, "float32", 1)
    assert "time_step_limit" not in config
    ours = json.loads((tmp_path / "m" / "ssm_jax.json").read_text())
    assert ours == {"family": "mamba", "config": {"vocab_size": 19, "pad_vocab_size_multiple": 8, "dt_rank": "auto"}}
    report = json.loads((tmp_path / "m" / "parity.json").read_text())
    assert report["parameters"] == ssm_jax.count_parameters(model.config)
    assert report["tensors"]["backbone.layers.{i}.mixer.in_proj.weight"] == [64, 16]
    assert report["logits"] == {"compared": False, "reason": "not asked for"}


def test_large_weights_are_split_with_an_index(tmp_path: Path) -> None:
    model, params = small()
    ssm_jax.save_pretrained(model, params, tmp_path / "m", max_shard_bytes=6000, check=False)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    for shard in shards:
        held = load_file(tmp_path / "m" / shard)
        assert set(held) == {name for name, where in index["weight_map"].items() if where == shard}
        assert sum(x.nbytes for x in held.values()) <= 6000
    assert index["metadata"]["total_size"] == 4 * ssm_jax.count_parameters(model.config)
    assert_same(ssm_jax.from_pretrained(tmp_path / "m")[1], params)


def test_every_name_and_kind_of_weight_file(tmp_path: Path) -> None:
    expected = ssm_jax.from_pretrained(GOLDENS / TIED)[1]
    for name in ("weights.safetensors", "pytorch_model.bin", "model.pt"):
        folder = copy_golden(TIED, tmp_path / name)
        if name == "weights.safetensors":
            (folder / "model.safetensors").rename(folder / name)
        else:
            write_torch(folder / name, as_tensors(load_file(folder / "model.safetensors")))
            (folder / "model.safetensors").unlink()
        assert_same(ssm_jax.from_pretrained(folder)[1], expected)


def test_pickled_shards_with_an_index(tmp_path: Path) -> None:
    folder = copy_golden(TIED, tmp_path / "m")
    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((list(arrays)[::2], list(arrays)[1::2]), 1):
        shard = f"pytorch_model-0000{number}-of-00002.bin"
        write_torch(folder / shard, as_tensors({name: arrays[name] for name in names}))
        weight_map |= dict.fromkeys(names, shard)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(ssm_jax.from_pretrained(folder)[1], ssm_jax.from_pretrained(GOLDENS / TIED)[1])

    index.write_text(json.dumps({"weight_map": weight_map | {"more": shard}}))
    with pytest.raises(LayoutError, match=r"index\.json lists 'more', which its shard does not hold"):
        ssm_jax.from_pretrained(folder)
    for absent in ("pytorch_model-00003-of-00002.bin", "../elsewhere.bin"):
        index.write_text(json.dumps({"weight_map": weight_map | {EMBEDDING: absent}}))
        with pytest.raises(LayoutError, match=rf"lists the shard '{absent}', which is not beside it"):
            ssm_jax.from_pretrained(folder)
    index.write_text(json.dumps({"weights": {}}))
    with pytest.raises(LayoutError, match=r"has no 'weight_map'"):
        ssm_jax.from_pretrained(folder)


SAME_WEIGHTS: dict[str, Callable[[dict[str, np.ndarray]], object]] = {
    "head_stored_too": lambda w: w.update({HEAD: w[EMBEDDING].copy()}),
    "only_head_stored": lambda w: w.update({HEAD: w.pop(EMBEDDING)}),
    "original_name_of_the_table": lambda w: w.update({"backbone.embedding.weight": w.pop(EMBEDDING)}),
    "wrapper_prefix": lambda w: [w.update({f"model.{name}": w.pop(name)}) for name in list(w)],
    "double_precision": lambda w: w.update({name: x.astype(np.float64) for name, x in w.items()}),
}


@pytest.mark.parametrize("change", SAME_WEIGHTS.values(), ids=SAME_WEIGHTS)
def test_other_ways_to_store_the_same(tmp_path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    model, params = ssm_jax.from_pretrained(GOLDENS / TIED)
    again, read = ssm_jax.from_pretrained(copy_golden(TIED, tmp_path / "m", tensors=change))
    assert again.config == model.config
    assert_same(read, params)


def test_transformers_folder_that_says_tied_and_stores_two_matrices_loads_untied(tmp_path: Path) -> None:
    folder = copy_golden(TIED, tmp_path / "m", tensors=lambda w: w.update({HEAD: w[EMBEDDING] + 1}))
    with pytest.warns(UserWarning, match=r"says tied, but 'lm_head.weight' and 'backbone.embeddings.weight' differ"):
        model, params = ssm_jax.from_pretrained(folder)
    assert not model.config.tie_embeddings
    np.testing.assert_array_equal(params["head"]["kernel"].T, params["embed"]["embedding"] + 1)


def test_original_folder_that_says_tied_and_stores_two_matrices_is_refused(tmp_path: Path) -> None:
    folder = copy_golden(ORIGINAL_TIED, tmp_path / "m", tensors=lambda w: w.update({HEAD: w[HEAD] + 1}))
    with pytest.raises(LayoutError, match=r"set tie_embeddings to false in config\.json"):
        ssm_jax.from_pretrained(folder)


UNFIT: dict[str, tuple[str, Callable[[dict[str, np.ndarray]], object], str]] = {
    "missing": (TIED, lambda w: w.pop("backbone.layers.1.mixer.D"), r"missing: backbone\.layers\.1\.mixer\.D\."),
    "untied_without_head": (UNTIED, lambda w: w.pop(HEAD), r"missing: lm_head\.weight"),
    "left_over": (
        TIED,
        lambda w: w.update({"backbone.layers.2.norm.weight": w["backbone.norm_f.weight"]}),
        r"left over: backbone\.layers\.2\.norm\.weight",
    ),
    "misshapen": (
        TIED,
        lambda w: w.update({"backbone.layers.0.mixer.conv1d.weight": w["backbone.layers.0.mixer.conv1d.weight"][:, 0]}),
        r"of another shape: backbone\.layers\.0\.mixer\.conv1d\.weight \[64, 4\] \(expected \[64, 1, 4\]\)",
    ),
    "transposed": (
        TIED,
        lambda w: w.update({"backbone.layers.0.mixer.in_proj.weight": w["backbone.layers.0.mixer.in_proj.weight"].T}),
        r"of another shape: backbone\.layers\.0\.mixer\.in_proj\.weight \[32, 128\]",
    ),
    "integers": (
        TIED,
        lambda w: w.update({"backbone.norm_f.weight": w["backbone.norm_f.weight"].astype(np.int8)}),
        r"not of floating-point numbers: backbone\.norm_f\.weight \(int8\)",
    ),
    "twice": (
        TIED,
        lambda w: w.update({"backbone.embedding.weight": w[EMBEDDING]}),
        r"holds 'backbone\.embeddings\.weight' twice",
    ),
    "many_missing": (
        TIED,
        lambda w: [w.pop(name) for name in list(w) if "layers.1" in name],
        r"missing: backbone\.layers\.1\.norm\.weight, .* and 6 more",
    ),
}


@pytest.mark.parametrize(("folder", "change", "message"), UNFIT.values(), ids=UNFIT)
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, folder: str, change: Callable[[dict[str, np.ndarray]], object], message: str
) -> None:
    with pytest.raises(LayoutError, match=rf"{tmp_path / 'm'}.*{message}"):
        ssm_jax.from_pretrained(copy_golden(folder, tmp_path / "m", tensors=change))


def test_a_config_of_another_size_names_the_tensors(tmp_path: Path) -> None:
    folder = copy_golden(TIED, tmp_path / "m", lambda c: c.update(vocab_size=97, num_hidden_layers=3))
    with pytest.raises(LayoutError, match=r"missing: .*layers\.2.*; of another shape: .*embeddings\.weight \[96, 32\]"):
        ssm_jax.from_pretrained(folder)


def test_incomplete_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"state-spaces/mamba-130m is not a folder; download"):
        ssm_jax.from_pretrained("state-spaces/mamba-130m")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LayoutError, match=r"empty holds no weights"):
        ssm_jax.from_pretrained(tmp_path / "empty")
    folder = copy_golden(TIED, tmp_path / "m")
    (folder / "config.json").write_text("{")
    with pytest.raises(LayoutError, match=r"m/config\.json is not valid JSON"):
        ssm_jax.from_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(LayoutError, match=r"m/config\.json holds a list"):
        ssm_jax.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(LayoutError, match=r"m has no config\.json; .* look like mamba in the layout 'transformers'"):
        ssm_jax.from_pretrained(folder)


def test_notes_of_another_family_are_refused(tmp_path: Path) -> None:
    folder = copy_golden(TIED, tmp_path / "m")
    (folder / "ssm_jax.json").write_text(json.dumps({"family": "gss", "config": {}}))
    with pytest.raises(
        LayoutError, match=r"ssm_jax\.json is of a gss model, and the rest of the folder of mamba; remove it"
    ):
        ssm_jax.from_pretrained(folder)


def test_types_and_overrides() -> None:
    model, params = ssm_jax.from_pretrained(GOLDENS / TIED, dtype=jnp.bfloat16)
    assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    model, params = ssm_jax.from_pretrained(GOLDENS / TIED, dtype="bfloat16", param_dtype="float32", remat="full")
    assert (model.config.dtype, model.config.param_dtype, model.config.remat) == ("bfloat16", "float32", "full")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    with pytest.raises(ConfigError, match=r"remats.*did you mean 'remat'"):
        ssm_jax.from_pretrained(GOLDENS / TIED, remats="full")
    with pytest.raises(LayoutError, match=r"of another shape"):
        ssm_jax.from_pretrained(GOLDENS / TIED, d_state=9)


@pytest.mark.parametrize("layout", ["transformers", "ssm_jax"])
def test_leaves_land_on_the_shardings_asked_for(tmp_path: Path, layout: str) -> None:
    model, params = small()
    ssm_jax.save_pretrained(model, params, tmp_path / "m", layout, check=False)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    spread = {"embed": {"embedding": rows}}
    tree = jax.tree.map(lambda _: everywhere, params) | spread
    for shardings in (tree, lambda shapes: jax.tree.map(lambda _: everywhere, shapes) | spread):
        read = ssm_jax.from_pretrained(tmp_path / "m", shardings=shardings)[1]
        assert read["embed"]["embedding"].sharding == rows
        assert read["norm_f"]["scale"].sharding == everywhere
        assert_same(read, params)
    alone = SingleDeviceSharding(jax.devices()[3])
    read = ssm_jax.from_pretrained(tmp_path / "m", shardings=alone)[1]
    assert all(leaf.sharding == alone for leaf in jax.tree.leaves(read))


def test_sharded_parameters_are_exported_whole(tmp_path: Path) -> None:
    model, params = small()
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    kernel = params["layers"]["mixer"]["in_proj"]["kernel"]
    spread["layers"]["mixer"]["in_proj"]["kernel"] = jax.device_put(
        kernel, NamedSharding(mesh, PartitionSpec("fsdp", None, None, "tensor"))
    )
    ssm_jax.save_pretrained(model, spread, tmp_path / "m", check=False)
    assert_same(ssm_jax.from_pretrained(tmp_path / "m")[1], params)


@pytest.mark.parametrize("layout", ["transformers", "mamba_ssm"])
def test_the_model_never_exists_twice(tmp_path: Path, layout: str) -> None:
    model, params = small(vocab_size=512, d_model=256, n_layers=16, expand=1)
    size = 4 * ssm_jax.count_parameters(model.config)
    tracemalloc.start()
    try:
        ssm_jax.save_pretrained(model, params, tmp_path / "m", layout, check=False)
        writing = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        read = ssm_jax.from_pretrained(tmp_path / "m")[1]
        reading = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert_same(read, params)
    # On a CPU the leaves that were read are host memory themselves.
    assert reading < 1.25 * size, "more than the result was on the host"
    assert writing < 0.25 * size, "more than a few tensors of one layer were on the host at once"


def test_what_a_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    model, params = small(norm_eps=1e-3)
    with pytest.raises(LayoutError, match=r"layout 'mamba_ssm': norm_eps is 0\.001, and mamba_ssm has only 1e-05"):
        ssm_jax.save_pretrained(model, params, tmp_path / "m", "mamba_ssm", check=False)
    with pytest.raises(LayoutError, match=r"Layout 'transformer' is unknown; did you mean 'transformers'"):
        ssm_jax.save_pretrained(model, params, tmp_path / "m", "transformer", check=False)
    extra = jax.tree.map(lambda x: x, params)
    extra["layers"]["mixer"]["in_proj"]["lora_a"] = jnp.ones((2, 16, 4))
    with pytest.raises(LayoutError, match=r"'layers/mixer/in_proj/lora_a'.*the model has no such parameter"):
        ssm_jax.save_pretrained(model, extra, tmp_path / "m", check=False)
    fewer = {key: value for key, value in params.items() if key != "norm_f"}
    with pytest.raises(LayoutError, match=r"'norm_f/scale' is missing"):
        ssm_jax.save_pretrained(model, fewer, tmp_path / "m", check=False)
    assert not list(tmp_path.iterdir())


def test_existing_folders_are_kept_unless_told_otherwise(tmp_path: Path) -> None:
    model, params = small()
    target = tmp_path / "m"
    target.mkdir()
    ssm_jax.save_pretrained(model, params, target, check=False)  # an empty folder is free
    other = random_params(model, seed=1)
    with pytest.raises(LayoutError, match=r"m already holds a model; .*overwrite"):
        ssm_jax.save_pretrained(model, other, target, check=False)
    assert_same(ssm_jax.from_pretrained(target)[1], params)
    ssm_jax.save_pretrained(model, other, target, "mamba_ssm", overwrite=True, check=False)
    assert not (target / "model.safetensors").exists()
    assert_same(ssm_jax.from_pretrained(target)[1], other)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(LayoutError, match=r"home exists and is not a folder of weights"):
        ssm_jax.save_pretrained(model, params, tmp_path / "home", overwrite=True, check=False)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "irreplaceable"


def test_a_failed_write_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = small()
    ssm_jax.save_pretrained(model, params, tmp_path / "m", check=False)

    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained, "write_weights", full_disk)
    with pytest.raises(LayoutError, match=r"m could not be written \(No space left on device\); nothing was changed"):
        ssm_jax.save_pretrained(model, random_params(model, 1), tmp_path / "m", overwrite=True, check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert_same(ssm_jax.from_pretrained(tmp_path / "m")[1], params)
