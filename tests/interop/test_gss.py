"""Gated state spaces to and from the original package: every spelling of its state dicts, live parity, refusals."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax.errors import LayoutError
from ssm_jax.interop.folder import open_weights, write_weights
from ssm_jax.interop.layouts import writable
from ssm_jax.interop.tensor_map import to_tensors
from ssm_jax.models import GSSConfig
from tests.conformance.compare import assert_close
from tests.conformance.golden import GOLDENS, apply
from tests.interop.folders import as_tensors, assert_same, copy_golden, random_params

PLAIN, PATCHED = "gss/s1_even16", "gss/s2_odd37_patched"
CONFIGS = {
    "plain": GSSConfig(vocab_size=61, d_model=16, n_layers=2, dss_kernel_N=12, dss_kernel_H=8),
    "patched": GSSConfig(
        vocab_size=40, d_model=32, n_layers=3, dim_expansion_factor=1.7, dss_kernel_N=9, dss_kernel_H=10, final_norm=True
    ),
    "tied_slow": GSSConfig(
        vocab_size=40, d_model=16, n_layers=2, dss_kernel_N=12, dss_kernel_H=8, final_norm=True, tie_embeddings=True,
        dss_kernel_lambda_imag_exp=False, init="slow", accurate=True, remat="full",
    ),
}  # fmt: skip


def rewritten(folder: str, target: Path, rename: Callable[[str], str | None]) -> Path:
    """A golden folder with other names in one ``model.pt``; None leaves a tensor out."""
    copy_golden(folder, target)
    tensors = {name: np.array(tensor.load()) for name, tensor in open_weights(target).items()}
    (target / "weights.safetensors").unlink()
    renamed = {new: value for name, value in tensors.items() if (new := rename(name)) is not None}
    write_weights(target, as_tensors(renamed), "model.pt", 2**30)
    return target


@pytest.mark.parametrize(
    ("folder", "layout", "tensors"), [(PLAIN, "gated_state_spaces", 30), (PATCHED, "naxalpha", 46)]
)
def test_goldens_are_recognised(folder: str, layout: str, tensors: int) -> None:
    source = ssm_jax.interop.pretrained.open_folder(GOLDENS / folder)
    assert source.layout.name == layout
    assert len(source.tensors) == tensors
    assert source.model.config.final_norm == (folder == PATCHED)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: "net." + name,
        lambda name: re.sub(r"^layers\.(\d+)\.", r"layers.\1.0.", name),
        lambda name: "net." + re.sub(r"^layers\.(\d+)\.", r"layers.\1.0.", name),
    ],
    ids=["wrapped", "nested", "wrapped_nested"],
)
def test_every_spelling_is_the_same_model(tmp_path: Path, rename: Callable[[str], str]) -> None:
    model, params = ssm_jax.from_pretrained(GOLDENS / PLAIN)
    again, read = ssm_jax.from_pretrained(rewritten(PLAIN, tmp_path / "m", rename))
    assert again.config == model.config
    assert_same(read, params)


def test_a_config_with_a_trailing_comma(tmp_path: Path) -> None:
    """As in the published repository, whose config holds three keys."""
    folder = copy_golden(PLAIN, tmp_path / "m")
    (folder / "config.json").write_text('{"num_tokens": 61, "dim": 16, "depth": 2,\n}\n')
    model, _ = ssm_jax.from_pretrained(folder)
    assert model.config == ssm_jax.from_pretrained(GOLDENS / PLAIN)[0].config, "widths are the weights'"


def test_text_in_a_config_is_not_taken_for_a_trailing_comma(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(r'{"a": ",}", "b": ["\",]", 1,], }')
    assert ssm_jax.interop.folder.read_json(tmp_path / "a.json") == {"a": ",}", "b": ['",]', 1]}


@pytest.mark.parametrize("left_out", ["net.to_logits.1.weight", "net.token_emb.weight"])
def test_a_matrix_that_is_stored_once_is_both(tmp_path: Path, left_out: str) -> None:
    folder = rewritten(PATCHED, tmp_path / "once", lambda name: None if name == left_out else name)
    stored = dict(open_weights(folder))
    model, params = ssm_jax.from_pretrained(folder)
    assert model.config.tie_embeddings
    assert "head" not in params
    kept = {"net.to_logits.1.weight", "net.token_emb.weight"} - {left_out}
    np.testing.assert_array_equal(params["embed"]["embedding"], stored[kept.pop()].load())


def test_a_head_that_is_stored_twice_stays_apart_unless_asked(tmp_path: Path) -> None:
    """They may part in training; ``tie_embeddings=True`` keeps one, if they are equal."""

    def equal(tensors: dict[str, np.ndarray]) -> None:
        tensors["net.to_logits.1.weight"] = tensors["net.token_emb.weight"]

    folder = copy_golden(PATCHED, tmp_path / "twice", tensors=equal)
    (folder / "weights.safetensors").unlink()
    model, params = ssm_jax.from_pretrained(folder)
    tied_model, tied = ssm_jax.from_pretrained(folder, tie_embeddings=True)
    assert not model.config.tie_embeddings
    assert tied_model.config.tie_embeddings
    np.testing.assert_array_equal(params["head"]["kernel"], tied["embed"]["embedding"].T)
    with pytest.raises(LayoutError, match="tie_embeddings=True was passed, but head and token table differ"):
        ssm_jax.from_pretrained(GOLDENS / PATCHED, tie_embeddings=True)


@pytest.mark.parametrize("layout", ["gated_state_spaces", "naxalpha", "ssm_jax"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_export_then_import_is_bit_identical(tmp_path: Path, config: GSSConfig, layout: str) -> None:
    model = ssm_jax.build(config)
    params = random_params(model)
    ssm_jax.save_pretrained(model, params, tmp_path / "m", layout, check=False)
    again, read = ssm_jax.from_pretrained(tmp_path / "m")
    assert again.config == config
    assert_same(read, params)


def test_the_published_format_is_written_as_it_was_read(tmp_path: Path) -> None:
    model, params = ssm_jax.from_pretrained(GOLDENS / PATCHED)
    ssm_jax.save_pretrained(model, params, tmp_path / "m", "naxalpha", check=False)
    written, golden = (
        {name: tensor.load() for name, tensor in open_weights(root).items()}
        for root in (tmp_path / "m", GOLDENS / PATCHED)
    )
    assert set(written) == set(golden)
    for name, value in golden.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name, strict=True)
    content = json.loads((tmp_path / "m" / "config.json").read_text())
    assert content == json.loads((GOLDENS / PATCHED / "config.json").read_text())


@pytest.mark.torch
@pytest.mark.parametrize("layout", ["gated_state_spaces", "naxalpha"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_package_loads_an_export_and_computes_the_same(tmp_path: Path, config: GSSConfig, layout: str) -> None:
    """Strict keys; logits within 2e-5 and the gradient of every parameter within 1e-4 of its largest entry."""
    import torch

    from ssm_jax.interop.layouts.gss import torch_model

    model = ssm_jax.build(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    mixer = params["layers"]["mixer"]
    mixer |= {name: mixer[name] / config.dss_kernel_N**0.5 for name in ("C_real", "C_imag")}
    ssm_jax.save_pretrained(model, params, tmp_path / "m", layout)
    report = json.loads((tmp_path / "m" / "parity.json").read_text())
    assert report["logits"]["compared"]
    theirs = torch_model(tmp_path / "m")
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 38)).astype(np.int32)
    inputs, labels = (torch.from_numpy(x.astype(np.int64)) for x in (tokens[:, :-1], tokens[:, 1:]))
    with jax.default_matmul_precision("highest"):
        assert_close(apply(model, params, tokens[:, :-1])[0], theirs(inputs).detach().numpy(), 2e-5)
    theirs(inputs, labels).backward()

    def loss(params: Any) -> jax.Array:
        logits, _ = model.apply({"params": params}, jnp.asarray(tokens[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1))

    with jax.default_matmul_precision("highest"):
        gradients = jax.jit(jax.grad(loss))(params)
    row = writable("gss", "gated_state_spaces")
    ours = {row.spelling(config, name): tensor.load() for name, tensor in to_tensors(row.tensors, gradients).items()}
    expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    if config.tie_embeddings:  # the package holds the one matrix twice
        expected["token_emb.weight"] = expected["token_emb.weight"] + expected.pop("to_logits.1.weight")
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert_close(ours[name], value, 1e-4 * float(np.abs(value).max()))


@pytest.mark.torch
@pytest.mark.parametrize("layout", ["gated_state_spaces", "naxalpha"])
def test_the_code_that_loads_an_export_does(tmp_path: Path, layout: str) -> None:
    """As the layout prints it, with a patched head and without."""
    for name in ("plain", "patched"):
        model = ssm_jax.build(CONFIGS[name])
        params = random_params(model)
        ssm_jax.save_pretrained(model, params, tmp_path / name, layout, check=False)
        scope: dict[str, Any] = {}
        exec(writable("gss", layout).load_in_torch.format(path=tmp_path / name), scope)
        loaded = {key.removeprefix("net."): tensor for key, tensor in scope["model"].state_dict().items()}
        np.testing.assert_array_equal(loaded["token_emb.weight"], params["embed"]["embedding"])
        head = "to_logits.1.weight" if name == "patched" else "to_logits.weight"
        np.testing.assert_array_equal(loaded[head].T, params["head"]["kernel"])
        report = json.loads((tmp_path / name / "parity.json").read_text())
        written = {re.sub(r"layers\.\d+\.", "layers.{i}.", key) for key in scope["model"].state_dict()}
        assert set(report["tensors"]) == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(dss_kernel_n=3), r"'dss_kernel_n' is not an argument of GatedStateSpacesLM"),
        (lambda c: c.update(dim="wide"), r"'dim' is 'wide'; it must be an integer"),
        (lambda c: c.pop("depth"), r"describes no known model .*Its tensors look like gss in the layout"),
    ],
)
def test_bad_configs_are_named(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        ssm_jax.from_pretrained(copy_golden(PLAIN, tmp_path / "m", change))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = rewritten(PLAIN, tmp_path / "m", lambda name: None if name == "layers.1.dss.C_imag" else name)
    with pytest.raises(LayoutError, match=r"missing: layers\.1\.dss\.C_imag"):
        ssm_jax.from_pretrained(folder)


def test_weights_of_another_family_name_it(tmp_path: Path) -> None:
    folder = copy_golden("mamba/tied_defaults", tmp_path / "m")
    (folder / "config.json").write_text('{"num_tokens": 61, "dim": 16, "depth": 2}')
    with pytest.raises(LayoutError, match=r"read as gss .* The tensors look like mamba in the layout 'transformers'"):
        ssm_jax.from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_every": 2, "attention_heads": 2}, "attention_every is set, and the package has no attention"),
        ({"norm_eps": 1e-6}, "the package has only 1e-05"),
        ({"pad_vocab_size_multiple": 8}, "the token table is padded"),
    ],
)
def test_what_the_package_cannot_express_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    model = ssm_jax.build(CONFIGS["plain"], **fields)
    with pytest.raises(LayoutError, match=message):
        ssm_jax.save_pretrained(model, random_params(model), tmp_path / "m", check=False)
    assert not (tmp_path / "m").exists()


def test_an_unknown_layout_names_the_nearest(tmp_path: Path) -> None:
    model = ssm_jax.build(CONFIGS["plain"])
    with pytest.raises(LayoutError, match="'gated_state_space' is unknown; did you mean 'gated_state_spaces'"):
        ssm_jax.save_pretrained(model, random_params(model), tmp_path / "m", "gated_state_space")
