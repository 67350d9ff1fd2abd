"""Logical axes, rules, and the refusals that come before any compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ssm_jax import optim, sharding
from ssm_jax.config import from_dict
from ssm_jax.errors import ConfigError, ShardingError
from ssm_jax.nn.state import LMState, Mamba2State, MambaState
from ssm_jax.sharding import MeshConfig


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def mamba_shapes(D: int = 16, E: int = 32, V: int = 64, n: int = 2) -> dict:
    mixer = {
        "in_proj": {"kernel": shape(n, D, 2, E), "bias": shape(n, 2, E)},
        "conv": {"kernel": shape(n, 4, E), "bias": shape(n, E)},
        "dt_down": {"kernel": shape(n, E, 1)},
        "B_proj": {"kernel": shape(n, E, 8)},
        "C_proj": {"kernel": shape(n, E, 8)},
        "dt_up": {"kernel": shape(n, 1, E)},
        "dt_bias": shape(n, E),
        "A_log": shape(n, E, 8),
        "D": shape(n, E),
        "out_proj": {"kernel": shape(n, E, D), "bias": shape(n, D)},
    }
    return {
        "embed": {"embedding": shape(V, D)},
        "layers": {"norm": {"scale": shape(n, D)}, "mixer": mixer},
        "norm_f": {"scale": shape(D)},
        "head": {"kernel": shape(D, V)},
    }


def mesh(**sizes: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(**sizes))


def specs(tree: object, on: jax.sharding.Mesh) -> dict[str, tuple]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(sharding.shardings(tree, on))
    return {sharding.path_name(path): tuple(placed.spec) for path, placed in leaves}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (8, 1, 1, 1)),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 2, 1)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1, 1)),
        ({"data": 2, "tensor": 4}, (2, 1, 4, 1)),
    ],
)
def test_mesh_fills_the_free_axis(sizes: dict, expected: tuple) -> None:
    made = mesh(**sizes)
    assert made.axis_names == ("data", "fsdp", "tensor", "sequence")
    assert tuple(made.shape.values()) == expected


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"data": 2}, {"data": 16}])
def test_mesh_that_does_not_fit_the_devices(sizes: dict) -> None:
    with pytest.raises(ShardingError, match=r"does not fit 8 device\(s\); change mesh\.\*"):
        mesh(**sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"sequence": 2}, r"mesh\.sequence is 2; only 1 works"),
        ({"fsdp": 0}, "must be at least 1"),
        ({"fsdp": -1}, "at most once"),
        ({"fdsp": 2}, "did you mean 'fsdp'"),
    ],
)
def test_mesh_config_refuses(sizes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(MeshConfig, sizes, "mesh.")


def test_parameters_are_split_over_fsdp_and_tensor() -> None:
    placed = specs(mamba_shapes(), mesh(data=2, fsdp=2, tensor=2))
    assert placed["embed/embedding"] == ("tensor", "fsdp")
    assert placed["head/kernel"] == ("fsdp", "tensor")
    assert placed["layers/mixer/in_proj/kernel"] == (None, "fsdp", None, "tensor")
    assert placed["layers/mixer/out_proj/kernel"] == (None, "tensor", "fsdp")
    assert placed["layers/mixer/A_log"] == (None, "tensor", None)
    assert placed["layers/mixer/D"] == (None, "tensor")
    assert placed["layers/norm/scale"] == (None, None)


def test_moments_lie_like_their_parameters_and_counters_on_every_device() -> None:
    params, on = mamba_shapes(), mesh(fsdp=2, tensor=2)
    moments = jax.eval_shape(optim.make_optimizer(optim.OptimConfig()).init, params)
    placed, of_params = specs(moments, on), specs(params, on)
    for name, spec in of_params.items():
        assert placed[f"inner_state/1/mu/{name}"] == placed[f"inner_state/1/nu/{name}"] == spec
    assert len(placed) == 2 * len(of_params) + 4
    assert placed["inner_state/1/count"] == placed["notfinite_count"] == ()


def test_every_parameter_must_fit_exactly_one_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShardingError, match="layers/mixer/gate/kernel with 2 axes fits 0 entries"):
        sharding.logical_axes({"layers": {"mixer": {"gate": {"kernel": shape(2, 3)}}}})
    twice = (*sharding.PARAMETER_AXES, (r"embedding", ("vocab", "embed")))
    monkeypatch.setattr(sharding, "PARAMETER_AXES", twice)
    with pytest.raises(ShardingError, match="embed/embedding with 2 axes fits 2 entries"):
        sharding.logical_axes({"embed": {"embedding": shape(8, 4)}})


def test_sizes_that_do_not_divide_are_named_with_the_fix() -> None:
    with pytest.raises(
        ShardingError, match=r"embed/embedding: axis 'vocab' of size 50 .* mesh.tensor=4; .*pad_vocab_size"
    ):
        sharding.shardings(mamba_shapes(V=50), mesh(tensor=4))
    with pytest.raises(ShardingError, match=r"axis 'embed' of size 12 does not divide over mesh.fsdp=8; .*widths"):
        sharding.shardings(mamba_shapes(D=12), mesh(data=1, fsdp=8))


def test_two_axes_on_one_mesh_axis_are_refused() -> None:
    rules = {**sharding.RULES, "inner": "fsdp"}
    with pytest.raises(ShardingError, match=r"in_proj/kernel: logical axes 'embed' and 'inner' .* 'fsdp'"):
        sharding.shardings(mamba_shapes()["layers"]["mixer"], mesh(fsdp=2), ONLY_IN_PROJ, rules)


ONLY_IN_PROJ = jax.tree.map(
    lambda leaf: ("layers", "embed", None, "inner") if leaf.ndim == 4 else (None,) * leaf.ndim,
    mamba_shapes()["layers"]["mixer"],
)


def test_unknown_logical_axis() -> None:
    with pytest.raises(ShardingError, match="logical axis 'colour' has no rule"):
        sharding.partition_spec(("colour",), (4,), mesh())


def test_recurrent_states() -> None:
    on = mesh(data=2, fsdp=2, tensor=2)
    mamba = LMState(MambaState(conv=shape(2, 8, 3, 32), ssm=shape(2, 8, 16, 32)), shape(8))
    placed = sharding.state_shardings(mamba, on)
    assert placed.layers.ssm.spec == PartitionSpec(None, ("data", "fsdp"), None, "tensor")
    assert placed.position.spec == PartitionSpec(("data", "fsdp"))
    mamba2 = LMState(
        Mamba2State(shape(2, 8, 3, 32), shape(2, 8, 3, 16), shape(2, 8, 3, 16), shape(2, 8, 4, 16, 8)), shape(8)
    )
    assert sharding.state_shardings(mamba2, on).layers.ssm.spec == PartitionSpec(
        None, ("data", "fsdp"), "tensor", None, None
    )
    with pytest.raises(ShardingError, match="axis 'batch' of size 6"):
        sharding.state_shardings(LMState(MambaState(shape(2, 6, 3, 32), shape(2, 6, 16, 32)), shape(6)), on)


def test_batches_are_split_by_lanes() -> None:
    on = mesh(data=2, fsdp=2, tensor=2)
    placed = sharding.put_batch({"tokens": np.arange(32, dtype=np.int32).reshape(8, 4)}, on)["tokens"]
    np.testing.assert_array_equal(placed, np.arange(32).reshape(8, 4))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 4)}


def test_table_names_every_leaf() -> None:
    on = mesh(fsdp=2, tensor=2)
    lines = sharding.describe(mamba_shapes(), on).splitlines()
    assert len(lines) == 1 + len(jax.tree.leaves(mamba_shapes()))
    embedding = next(line for line in lines if line.startswith("embed/embedding"))
    assert embedding.split("  ")[-1].strip() == f"{64 * 16 * 4 // 4:,}"
    assert "tensor, fsdp" in embedding
