"""The update: its loss, accumulation, sharding, freezing, the guard, and what the compiled program holds."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ssm_jax
from ssm_jax import optim, sharding
from ssm_jax.models import LanguageModel
from ssm_jax.optim import OptimConfig
from ssm_jax.sharding import MeshConfig
from ssm_jax.training import state as state_lib
from ssm_jax.training.step import abstract_batch, compile_step, make_step

LANES, LENGTH, VOCAB = 8, 12, 40
OPTIM = OptimConfig(lr=1e-2, schedule="constant")


@functools.cache
def small_model(family: str = "mamba") -> LanguageModel:
    extra = {
        "mamba": {},
        "mamba2": {"headdim": 4, "d_state": 8, "ngroups": 2},
        "gpt2": {"n_heads": 4, "n_positions": LENGTH},
        "gpt_neox": {"n_heads": 2, "n_positions": LENGTH},
        "llama": {"n_heads": 4, "n_kv_heads": 2, "n_positions": LENGTH},
    }
    return ssm_jax.build(family, vocab_size=VOCAB, d_model=16, n_layers=2, **extra[family])


def random_batch(seed: int) -> dict[str, np.ndarray]:
    """Two documents per row, the second one's last tokens absent, uneven weights."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (LANES, LENGTH + 1), dtype=np.int32)
    positions = np.tile(np.r_[np.arange(5), np.arange(LENGTH - 5)].astype(np.int32), (LANES, 1))
    positions[-1, -3:] = -1
    weights = (rng.random((LANES, LENGTH)) < 0.8).astype(np.float32)
    weights[:, 4] = 0
    weights[positions < 0] = 0
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions, "weights": weights}


def trainer(
    family: str = "mamba", config: OptimConfig = OPTIM, microbatches: int = 1, **mesh_sizes: int
) -> tuple[jax.sharding.Mesh, Any, state_lib.TrainState, dict]:
    """(mesh, compiled step, state, frozen)."""
    mesh, step, create = compiled(family, config, microbatches, tuple(mesh_sizes.items()))
    return mesh, step, *create()


@functools.cache
def compiled(family: str, config: OptimConfig, microbatches: int, mesh_sizes: tuple) -> tuple[Any, Any, Any]:
    model = small_model(family)
    mesh = sharding.make_mesh(MeshConfig(**dict(mesh_sizes)), None if mesh_sizes else jax.devices()[:1])
    shapes = state_lib.abstract(model, config, mesh)
    step = make_step(model, config, microbatches, sharding.batch_parts(mesh))
    program = compile_step(step, *shapes, abstract_batch(LANES, LENGTH, mesh), mesh)
    return mesh, program, functools.partial(state_lib.initialize, model, config, mesh, 0, 100)


def host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


@functools.cache
def unsharded_run(family: str) -> tuple[Any, list[float]]:
    """(initial parameters, losses) of twenty steps on one device."""
    return run_steps(*trainer(family), steps=20)


def run_steps(mesh: Any, step: Any, state: Any, frozen: Any, steps: int) -> tuple[Any, list[float]]:
    first, losses = host(state.params), []
    for _ in range(steps):
        state, metrics = step(state, frozen, sharding.put_batch(random_batch(0), mesh))
        losses.append(float(metrics["loss"]))
    return first, losses


def test_loss_is_the_weighted_mean_over_the_whole_batch() -> None:
    mesh, step, state, frozen = trainer()
    params, batch = host(state.params), random_batch(0)
    _, metrics = step(state, frozen, sharding.put_batch(batch, mesh))
    tokens, positions = jnp.asarray(batch["tokens"]), jnp.asarray(batch["positions"])
    logits, _ = small_model().apply({"params": jax.tree.map(jnp.asarray, params)}, tokens, positions=positions)
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch["targets"][..., None], 2)[..., 0]
    expected = np.sum(nll * batch["weights"]) / np.sum(batch["weights"])
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["weight"]) == batch["weights"].sum()


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        pytest.param("mamba", {"data": 8}, marks=pytest.mark.slow),
        pytest.param("mamba", {"data": 1, "fsdp": 8}, marks=pytest.mark.slow),
        pytest.param("mamba", {"data": 1, "tensor": 8}, marks=pytest.mark.slow),
        ("mamba", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("mamba2", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("llama", {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_sharded_equals_unsharded(family: str, sizes: dict[str, int]) -> None:
    first, losses = run_steps(*trainer(family, **sizes), steps=20)
    first_1, losses_1 = unsharded_run(family)
    jax.tree.map(np.testing.assert_array_equal, first, first_1)
    np.testing.assert_allclose(losses, losses_1, rtol=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["lion", "adafactor", "muon"])
def test_every_optimizer_is_the_same_on_a_mesh(name: str) -> None:
    """Wide enough that Adafactor factors; what of its state has a parameter's shape is split as the parameter is."""
    model = ssm_jax.build("mamba", vocab_size=VOCAB, d_model=128, n_layers=1, d_state=4)
    config = OptimConfig(name=name, lr=1e-3, schedule="constant", ema=0.9, freeze=("norm_f",))
    outcomes = []
    for sizes in ({"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        devices = jax.devices()[: 8 if len(sizes) > 1 else 1]
        mesh = sharding.make_mesh(MeshConfig(**sizes), devices)
        shapes = state_lib.abstract(model, config, mesh)
        program = compile_step(make_step(model, config), *shapes, abstract_batch(LANES, LENGTH, mesh), mesh)
        state, frozen = state_lib.initialize(model, config, mesh, 0, 100)
        outcomes.append(run_steps(mesh, program, state, frozen, steps=3)[1])
        split = [leaf for leaf in jax.tree.leaves(shapes[0].opt_state) if not leaf.sharding.is_fully_replicated]
        assert bool(split) == (len(sizes) > 1)
    np.testing.assert_allclose(*outcomes, rtol=1e-5)


def test_microbatches_give_the_update_of_the_whole_batch() -> None:
    outcomes = []
    for microbatches in (1, 4):
        mesh, step, state, frozen = trainer(microbatches=microbatches)
        state, metrics = step(state, frozen, sharding.put_batch(random_batch(0), mesh))
        moments = state.opt_state.inner_state[1].mu
        outcomes.append(host((moments, {name: metrics[name] for name in ("loss", "weight", "grad_norm")})))
    # Sums in another order: small entries carry the rounding of terms as large as the leaf's largest, a few float32 epsilons.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(a).max()), *outcomes)


def test_microbatches_on_a_mesh() -> None:
    sizes = {"data": 2, "fsdp": 1, "tensor": 4}
    _, losses = run_steps(*trainer(microbatches=2, **sizes), steps=3)
    np.testing.assert_allclose(losses, unsharded_run("mamba")[1][:3], rtol=1e-5)


def test_frozen_leaves_have_no_gradient_and_no_optimizer_state() -> None:
    config = OptimConfig(lr=1e-2, schedule="constant", freeze=("embed", "in_proj"))
    mesh, step, state, frozen = trainer(config=config)
    assert optim.partition.paths(frozen) == ["embed/embedding", "layers/mixer/in_proj/kernel"]
    trained = {name.split("params/")[-1] for name in optim.partition.paths({"params": state.params})}
    moments = state.opt_state.inner_state[1]
    assert set(optim.partition.paths(moments.mu)) == set(optim.partition.paths(moments.nu)) == trained
    assert not trained & set(optim.partition.paths(frozen))

    memory, trained_bytes = step.memory_analysis(), sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    frozen_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    assert frozen_bytes > 2000
    assert memory.output_size_in_bytes - 3 * trained_bytes < 1000
    whole = trainer()[1].memory_analysis()
    assert whole.output_size_in_bytes - memory.output_size_in_bytes >= 3 * frozen_bytes

    before, kept = host(state.params), host(frozen)
    state, _ = step(state, frozen, sharding.put_batch(random_batch(0), mesh))
    jax.tree.map(np.testing.assert_array_equal, host(frozen), kept)
    assert all(
        np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(host(state.params)), strict=True)
    )


def test_a_non_finite_update_changes_nothing_but_the_counts() -> None:
    mesh, step, state, frozen = trainer()
    state, _ = step(state, frozen, sharding.put_batch(random_batch(0), mesh))
    params, moments = host(state.params), host(state.opt_state.inner_state)
    spoiled = random_batch(1)
    spoiled["weights"][0, 0] = np.inf
    state, metrics = step(state, frozen, sharding.put_batch(spoiled, mesh))
    jax.tree.map(np.testing.assert_array_equal, host(state.params), params)
    jax.tree.map(np.testing.assert_array_equal, host(state.opt_state.inner_state), moments)
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"]), int(state.step)) == (1, 1, 2)
    state, metrics = step(state, frozen, sharding.put_batch(random_batch(2), mesh))
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 0)
    assert np.isfinite(float(metrics["loss"]))


def test_a_batch_without_targets_is_harmless() -> None:
    mesh, step, state, frozen = trainer()
    batch = random_batch(0)
    batch["weights"][:] = 0
    state, metrics = step(state, frozen, sharding.put_batch(batch, mesh))
    assert float(metrics["loss"]) == 0.0
    assert float(metrics["grad_norm"]) == 0.0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(host(state.params)))


def test_the_state_is_donated() -> None:
    mesh, step, state, frozen = trainer()
    new, _ = step(state, frozen, sharding.put_batch(random_batch(0), mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert step.memory_analysis().alias_size_in_bytes >= 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(new.params))


def test_weight_decay_of_the_real_models() -> None:
    transformer = {
        "q_proj/bias", "k_proj/bias", "v_proj/bias", "out_proj/bias", "up_proj/bias", "down_proj/bias", "norm_f/scale",
        "norm_f/bias", "layers/norm/scale", "layers/norm/bias", "mlp_norm/scale", "mlp_norm/bias",
    }  # fmt: skip
    kept_out = {
        "mamba": {"A_log", "D", "dt_bias", "conv/bias", "norm_f/scale", "layers/norm/scale"},
        "mamba2": {
            "A_log", "D", "dt_bias", "conv_x/bias", "conv_B/bias", "conv_C/bias", "mixer/norm/scale", "norm_f/scale",
            "layers/norm/scale",
        },
        "gpt2": transformer,
        "gpt_neox": transformer,
        "llama": {"norm_f/scale", "layers/norm/scale", "mlp_norm/scale"},
    }  # fmt: skip
    for family, endings in kept_out.items():
        params = jax.eval_shape(small_model(family).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        mask = dict(zip(optim.partition.paths(params), jax.tree.leaves(optim.decay_mask(params)), strict=True))
        undecayed = {name for name, decays in mask.items() if not decays}
        assert len(undecayed) == len(endings)
        assert all(any(name.endswith(ending) for ending in endings) for name in undecayed)


def test_what_the_devices_tell_each_other() -> None:
    """Copies exchange gradients only; tensor parallelism adds up partial sums and never moves parameters or activations."""
    for sizes in ({"data": 8}, {"data": 1, "tensor": 8}):
        text = trainer(**sizes)[1].as_text()
        found = {name for name in COLLECTIVES if f" {name}(" in text or f" {name}-start(" in text}
        assert found == {"all-reduce"}


COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def test_a_device_holds_its_part_of_the_state_and_no_more() -> None:
    sizes = []
    for mesh_sizes in ({"data": 8}, {"data": 1, "fsdp": 8}, {"data": 1, "tensor": 8}):
        mesh, step, state, _ = trainer(**mesh_sizes)
        leaves = jax.tree.leaves((state, sharding.put_batch(random_batch(0), mesh)))
        parts = [math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves]
        sizes.append(sum(parts))
        unread = state.opt_state.last_finite.nbytes
        assert step.memory_analysis().argument_size_in_bytes == sum(parts) - unread
    assert sizes[0] > 1.5 * sizes[1] > 3 * sizes[2]
