"""Merging: against recorded merges, in place, in low precision, on a mesh, and refused before anything is used up."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ssm_jax import sharding
from ssm_jax.errors import ConfigError
from ssm_jax.optim import relora
from ssm_jax.optim.relora.blocks import add_product
from ssm_jax.optim.relora.merge import _compiled_merge
from tests.optim.relora import goldens

STACK = relora.Kernel("kernel$", (0,), (1,), (2, 3))


def matrix(rows: int, columns: int, dtype: str = "float32") -> relora.Leaf:
    return relora.Leaf("kernel", (rows, columns), dtype, (), (0,), (1,))


@pytest.mark.parametrize("name", [name for name in goldens.names("merge") if "rank_growth" not in name])
def test_recorded_merges(name: str) -> None:
    case, values = goldens.settings(name), {key: jnp.asarray(x) for key, x in goldens.tensors(name).items()}
    W, A, B = (values[f"{key}.before"].T for key in ("weight", "lora_A", "lora_B"))
    scale = case["scale"] if isinstance(case["scale"], float) else float(np.tanh(case["scaling_value"]))
    leaf = matrix(*W.shape, str(W.dtype))
    merged, _ = jax.jit(functools.partial(add_product, leaf=leaf, scale=scale))(W, A, B)
    assert merged.dtype == W.dtype
    tolerance = 2.0**-7 if W.dtype == jnp.bfloat16 else 1e-6  # one step of bfloat16, relative to the value
    wanted = np.asarray(values["weight.after"].T, np.float32)
    np.testing.assert_allclose(np.asarray(merged, np.float32), wanted, rtol=tolerance, atol=tolerance)
    x = values["x"].astype(jnp.float32)
    y = x @ merged.astype(jnp.float32)
    bias = np.asarray(values["y.before"], np.float32) - np.asarray(values["y.after"], np.float32)
    np.testing.assert_allclose(y, np.asarray(values["y.after"], np.float32), atol=30 * tolerance + np.abs(bias).max())
    assert float(relora.factors.init(jax.random.key(0), leaf, case["r"])[0].max()) <= case["lora_A_after_bound"]


def test_the_rank_of_the_change_grows_by_one_adapter_a_merge() -> None:
    case, values = goldens.settings("merge_09_rank_growth"), goldens.tensors("merge_09_rank_growth")
    with jax.enable_x64(True):
        W = start = jnp.asarray(values["weight.initial"].T)
        leaf = matrix(*W.shape, "float64")
        merge = jax.jit(functools.partial(add_product, leaf=leaf, scale=case["alpha"] / case["r"]))
        for i, (rank, singular) in enumerate(
            zip(
                case["rank_of_total_change_after_each_merge"],
                case["singular_values_after_each_merge"],
                strict=True,
            )
        ):
            W, _ = merge(W, jnp.asarray(values[f"lora_A.{i}"].T), jnp.asarray(values[f"lora_B.{i}"].T))
            found = np.linalg.svd(np.asarray(W - start), compute_uv=False)
            np.testing.assert_allclose(found, singular, atol=1e-10)
            assert np.sum(found > 1e-9) == rank == min((i + 1) * case["r"], *W.shape)
        np.testing.assert_allclose(W, values["weight.final"].T, rtol=1e-12)


@pytest.mark.parametrize(
    ("shape", "batch", "inputs", "outputs"),
    [
        ((6, 10), (), (0,), (1,)),
        ((3, 8, 2, 5), (0,), (1,), (2, 3)),
        ((2, 4, 6, 5), (0,), (1, 2), (3,)),
        ((4, 3, 8, 5), (1,), (2,), (0, 3)),
        ((40, 64), (), (1,), (0,)),
        ((7, 33, 64), (2,), (0,), (1,)),
    ],
)
def test_every_order_of_axes(shape: tuple, batch: tuple, inputs: tuple, outputs: tuple) -> None:
    """Block by block it is W + scale A B, written out kernel by kernel; and the sums are those of the change and of rounding."""
    leaf = relora.Leaf("kernel", shape, "bfloat16", batch, inputs, outputs)
    rng = np.random.default_rng(0)
    W = jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (leaf.a_shape(2), leaf.b_shape(2)))
    merged, sums = jax.jit(functools.partial(add_product, leaf=leaf, scale=0.3))(W, a, b)
    order = (*batch, *inputs, *outputs)
    moved = np.asarray(W, np.float64).transpose(order)
    stacked = int(np.prod([shape[i] for i in batch]))
    change = 0.3 * np.einsum(
        "nir,nro->nio",
        np.asarray(a, np.float64).reshape(stacked, -1, 2),
        np.asarray(b, np.float64).reshape(stacked, 2, -1),
    ).reshape(moved.shape)
    wanted = (moved + change).transpose(np.argsort(order))
    np.testing.assert_array_equal(merged, jnp.asarray(jnp.asarray(wanted, jnp.float32), jnp.bfloat16))
    lost = np.asarray(merged, np.float64) - wanted
    np.testing.assert_allclose(sums, [np.sum(change**2), np.sum(lost**2)], rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "dtype", "batch"),
    [
        ((8, 256, 2, 192), "float32", (0,)),
        ((2, 256, 2, 192), "bfloat16", (0,)),
        ((512, 2, 256), "float32", ()),
        ((512, 2, 256), "bfloat16", ()),
    ],
)
def test_a_merge_is_in_place(shape: tuple, dtype: str, batch: tuple) -> None:
    """Bound: 1.1 times the largest leaf of extra memory. What is found: less than half of one."""
    inputs = (len(batch),)
    leaf = relora.Leaf("", shape, dtype, batch, inputs, tuple(range(len(batch) + 1, len(shape))))
    on = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arguments = (
        jax.ShapeDtypeStruct(s, k)
        for s, k in ((shape, dtype), (leaf.a_shape(8), "float32"), (leaf.b_shape(8), "float32"))
    )
    memory = _compiled_merge(leaf, 0.25, on, True).lower(*arguments).compile().memory_analysis()
    size = relora.nbytes(jax.ShapeDtypeStruct(shape, dtype))
    assert memory.alias_size_in_bytes == size
    extra = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert extra <= 0.6 * size


def params(dtype: str = "float32") -> dict:
    """Two stacked kernels and something that is trained in full."""
    keys = jax.random.split(jax.random.key(3), 3)
    return {
        "layers": {
            "in_proj": {"kernel": jax.random.normal(keys[0], (2, 16, 2, 32)).astype(dtype)},
            "out_proj": {"kernel": jax.random.normal(keys[1], (2, 16, 2, 8)).astype(dtype)},
        },
        "norm": {"scale": jax.random.normal(keys[2], (16,))},
    }


def split(dtype: str = "float32", **how: str) -> tuple:
    frozen, trainable, spec = relora.split(params(dtype), STACK, rank=4, alpha=8.0, key=jax.random.key(1), **how)
    leaves = relora.trees.flat(trainable)
    drawn = {
        path: 0.1 * jax.random.normal(jax.random.key(len(path)), leaves[path].shape)
        for path in leaves
        if path[-2:] == ":b"
    }
    trainable = relora.trees.nested({**leaves, **{path: b.astype(leaves[path].dtype) for path, b in drawn.items()}})
    steps = relora.adamw(spec, 0.1)
    _, state = jax.jit(lambda t: steps.update(t, steps.init(t), t))(trainable)
    return frozen, trainable, spec, state


def copies(*trees: dict) -> tuple:
    return jax.tree.map(jnp.copy, trees)


@functools.lru_cache
def unsharded() -> tuple:
    frozen, trainable, spec, state = split()
    return relora.merge_and_reset(*copies(frozen, trainable, state), jax.random.key(7), spec=spec)


def test_merge_and_reset() -> None:
    """Only what it says changes: the kernels by the product, A to a fresh draw, B to zero, the adapters' moments to zero."""
    frozen, trainable, spec, state = split()
    merged, after, reset, metrics = unsharded()
    before = relora.export(frozen, trainable, spec)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), relora.export(merged, after, spec), before
    )
    old, new = relora.trees.flat(trainable), relora.trees.flat(after)
    for leaf in spec.leaves:
        assert not np.any(new[leaf.b_path])
        assert np.all(np.abs(new[leaf.a_path]) <= leaf.width_in**-0.5)
        assert not np.any(new[leaf.a_path] == old[leaf.a_path])
    np.testing.assert_array_equal(new["norm/scale"], old["norm/scale"])
    wanted = relora.reset_state(state, spec)
    jax.tree.map(np.testing.assert_array_equal, reset, wanted)
    changes = relora.trees.flat(jax.tree.map(lambda x, y: x - y, merged, frozen))
    norm = np.sqrt(sum(float(jnp.sum(change**2)) for change in changes.values()))
    np.testing.assert_allclose(metrics["merged_norm"], norm, rtol=1e-5)
    assert float(metrics["rounding_loss"]) < 1e-6
    assert float(metrics["state_zeroed"]) == 1.0


def test_a_merge_resets_as_it_is_told() -> None:
    frozen, trainable, spec, state = split()
    how: dict = {"method": "magnitude", "keep": 0.3, "reset_count": True}
    _, _, reset, metrics = relora.merge_and_reset(
        frozen, trainable, state, jax.random.key(7), spec=spec, donate=False, **how
    )
    wanted = relora.reset_state(state, spec, **how)
    jax.tree.map(np.testing.assert_array_equal, reset, wanted)
    assert 0.65 < float(metrics["state_zeroed"]) < 1.0
    _, _, reset, _ = relora.merge_and_reset(
        frozen, trainable, state, jax.random.key(7), spec=spec, method="random", keep=0.5, donate=False
    )
    wanted = relora.reset_state(state, spec, "random", keep=0.5, key=jax.random.key(7))
    jax.tree.map(np.testing.assert_array_equal, reset, wanted)


def test_arguments_are_used_up_or_not() -> None:
    frozen, trainable, spec, state = split()
    relora.merge_and_reset(frozen, trainable, state, jax.random.key(7), spec=spec, donate=False)
    relora.export(frozen, trainable, spec)
    relora.merge_and_reset(frozen, trainable, state, jax.random.key(7), spec=spec)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


@pytest.mark.parametrize("in_host_memory", [False, True])
def test_with_a_master_neither_tree_is_there_twice(in_host_memory: bool) -> None:
    frozen, trainable, spec, state = split(frozen_dtype="bfloat16")
    (master,) = copies(relora.partition(params(), spec)[0])
    if in_host_memory:
        master = jax.tree.map(lambda w: jax.device_put(w, relora.in_host_memory(w.sharding)), master)
    wanted = relora.export(relora.partition(params(), spec)[0], trainable, spec)
    results = relora.merge_with_master(master, frozen, trainable, state, jax.random.key(7), spec=spec)
    exported = relora.export(results[0], results[2], spec)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), exported, wanted)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((master, frozen)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(results))
    kinds = [{leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)} for tree in results[:2]]
    assert kinds == [{"pinned_host" if in_host_memory else "device"}, {"device"}]


def on_mesh(**sizes: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(sharding.MeshConfig(**sizes))


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}])
def test_sharded_is_unsharded_and_every_device_merges_its_own_part(sizes: dict) -> None:
    """Eight devices, A and B as placement says: the same values, the same draws, and no collective but for the metrics."""
    frozen, trainable, spec, state = split()
    mesh = on_mesh(**sizes)
    axes = {
        "layers/in_proj/kernel": ("layers", "embed", None, "inner"),
        "layers/out_proj/kernel": ("layers", "inner", None, "embed"),
    }
    known = relora.adapter_axes(spec, lambda path, ndim: axes[path])
    assert known["layers/in_proj/kernel:a"] == ("layers", "embed", "rank")
    assert known["layers/in_proj/kernel:b"] == ("layers", "rank", None, "inner")
    known |= axes

    def put(name: str, leaf: jax.Array) -> jax.Array:
        path = next((path for path in known if name.endswith(path) and leaf.ndim == len(known[path])), None)
        spec_of = P() if path is None else sharding.partition_spec(known[path], leaf.shape, mesh)
        return jax.device_put(leaf, NamedSharding(mesh, spec_of))

    def placed(tree: dict) -> dict:
        leaves, treedef = jax.tree.flatten(tree)
        return treedef.unflatten([put(name, leaf) for name, leaf in zip(relora.slots.names(tree), leaves, strict=True)])

    arguments = placed(frozen), placed(trainable), placed(state)
    where = [leaf.sharding for leaf in jax.tree.leaves(arguments)]
    results = relora.merge_and_reset(*arguments, jax.random.key(7), spec=spec)
    assert [leaf.sharding for leaf in jax.tree.leaves(results[:3])] == where
    for found, wanted in zip(results, unsharded(), strict=True):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), found, wanted)
    np.testing.assert_array_equal(
        results[1]["layers"]["in_proj"]["kernel:a"], unsharded()[1]["layers"]["in_proj"]["kernel:a"]
    )
    leaf = spec.leaves[0]
    kernel, a, b = (
        relora.trees.flat(tree)[path]
        for tree, path in zip(results[:2] + results[1:2], (leaf.path, leaf.a_path, leaf.b_path), strict=True)
    )
    program = _compiled_merge(
        relora.Leaf("", leaf.shape, "", leaf.batch, leaf.inputs, leaf.outputs), spec.scale, kernel.sharding, True
    )
    text = program.lower(kernel, a, b).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
    assert text.count(" all-reduce(") <= 1


def test_a_draw_depends_on_key_and_path_alone() -> None:
    _, trainable, spec, _ = split()
    redraw = functools.partial(relora.merge.redrawn, spec=spec, key=jax.random.key(5))
    factors = {path: relora.trees.flat(trainable)[path] for path in spec.adapters}
    one = jax.jit(redraw)(factors)
    backwards = relora.Spec(tuple(reversed(spec.leaves)), spec.rank, spec.alpha)
    other = jax.jit(functools.partial(relora.merge.redrawn, spec=backwards, key=jax.random.key(5)))(factors)
    for path in one:
        np.testing.assert_array_equal(one[path], other[path])
    drawn = [np.asarray(one[leaf.a_path]).ravel()[:16] for leaf in spec.leaves]
    assert all(not np.array_equal(x, y) for x, y in itertools.combinations(drawn, 2))
    leaf, draw = spec.leaves[0], jax.jit(relora.factors.init, static_argnums=(1, 2))
    same, another = (draw(jax.random.key(number), leaf, spec.rank)[0] for number in (5, 6))
    np.testing.assert_array_equal(one[leaf.a_path], same)
    assert not np.any(one[leaf.a_path] == another)


def test_bfloat16_kernels_report_what_rounding_took_and_a_master_loses_nothing() -> None:
    """Small changes to large weights: rounding takes a good part of each; summed in float32 nothing is lost."""
    _, _, spec, _ = split()
    frozen, trainable, spec, state = split(frozen_dtype="bfloat16")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(frozen))
    master = relora.partition(params(), spec)[0]
    small = relora.trees.flat(trainable)
    small = relora.trees.nested({path: x * 0.01 if path.endswith(":b") else x for path, x in small.items()})
    want = relora.export(master, small, spec)
    rounded, _, _, metrics = relora.merge_and_reset(frozen, small, state, jax.random.key(7), spec=spec, donate=False)
    assert 0.3 < float(metrics["rounding_loss"]) < 3
    master, kept, after, _, metrics = relora.merge_with_master(
        jax.tree.map(np.asarray, master), frozen, small, state, jax.random.key(7), spec=spec, donate=False
    )
    assert float(metrics["rounding_loss"]) < 1e-4
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), relora.export(master, after, spec), want
    )
    jax.tree.map(lambda x, m: np.testing.assert_array_equal(x, m.astype(jnp.bfloat16)), kept, master)
    error = [
        float(
            sum(
                jnp.sum((x.astype(jnp.float32) - m) ** 2)
                for x, m in zip(*map(jax.tree.leaves, (tree, master)), strict=True)
            )
        )
        for tree in (kept, rounded)
    ]
    assert error[0] < error[1]


def test_export_gives_back_the_tree_as_it_came() -> None:
    original = params("bfloat16")
    frozen, trainable, spec = relora.split(original, STACK, rank=4, alpha=8.0, dtype="float32", frozen_dtype="float32")
    assert (
        frozen["layers"]["in_proj"]["kernel"].dtype == trainable["layers"]["in_proj"]["kernel:a"].dtype == jnp.float32
    )
    exported = relora.export(frozen, trainable, spec)
    assert jax.tree.structure(exported) == jax.tree.structure(original)
    jax.tree.map(np.testing.assert_array_equal, exported, original)
    assert [leaf.dtype for leaf in jax.tree.leaves(exported)] == [leaf.dtype for leaf in jax.tree.leaves(original)]
    again = relora.partition(relora.combine(trainable, frozen), spec)
    jax.tree.map(np.testing.assert_array_equal, again, (frozen, trainable))


def test_refusals_come_before_anything_is_used_up() -> None:
    frozen, trainable, spec, state = split()
    shared = optax.adam(0.1).init(trainable)
    other = relora.Spec(spec.leaves, 2, 8.0)
    for message, how in {
        "share their step counter": {"opt_state": shared},
        "pass the trees that the plan was made for": {"spec": other},
        "'zeros' is unknown": {"method": "zeros"},
    }.items():
        arguments = {"opt_state": state, "spec": spec, **how}
        with pytest.raises(ConfigError, match=message):
            relora.merge_and_reset(frozen, trainable, key=jax.random.key(0), **arguments)
    with pytest.raises(ConfigError, match="The master has no"):
        relora.merge_with_master({"layers": {}}, frozen, trainable, state, jax.random.key(0), spec=spec)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((frozen, trainable, state)))


def test_cadence_counts_applied_updates() -> None:
    """Skipped updates shift nothing, a merge that is done is not repeated, one that was missed is made up."""
    assert [n for n in range(1, 13) if relora.is_due(n, 4, n // 4 - (n % 4 == 0))] == [4, 8, 12]
    assert not relora.is_due(4, 4, 1)
    assert relora.is_due(5, 4, 0)
    assert not relora.is_due(3, 4, 0)
    _, trainable, spec, _ = split()
    steps = relora.adamw(spec, 0.1)
    update, state = jax.jit(steps.update), steps.init(trainable)
    for bad in (False, True, False):
        grads = jax.tree.map(lambda x, bad=bad: jnp.full_like(x, jnp.nan if bad else 1.0), trainable)
        _, state = update(grads, state, trainable)
    assert int(relora.applied_updates(state)) == 2


def test_merges_wait_for_an_empty_accumulator() -> None:
    _, trainable, spec, _ = split()
    steps = optax.MultiSteps(relora.adamw(spec, 0.1), every_k_schedule=3)
    update, state = jax.jit(steps.update), steps.init(trainable)
    seen = []
    for _ in range(6):
        _, state = update(trainable, state, trainable)
        seen.append((int(relora.applied_updates(state)), bool(relora.accumulator_empty(state))))
    assert seen == [(0, False), (0, False), (1, True), (1, False), (1, False), (2, True)]
    assert bool(relora.accumulator_empty(relora.adamw(spec, 0.1).init(trainable)))
    with pytest.raises(ValueError, match=r"put relora\.count_applied"):
        relora.applied_updates(optax.sgd(0.1).init(trainable))
