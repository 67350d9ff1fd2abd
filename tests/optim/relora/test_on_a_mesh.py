"""A run of a small Llama with merges, on one device and on eight."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ssm_jax
from ssm_jax import sharding
from ssm_jax.optim import relora

FIELDS: dict[str, Any] = {"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 4, "d_mlp": 32, "n_positions": 16}
CYCLE, UPDATES = 3, 8


def run(mesh: jax.sharding.Mesh) -> tuple[list[float], dict]:
    """(losses, exported parameters); everything lies on the mesh as placement says, from its first moment."""
    model = ssm_jax.build("llama", **FIELDS)
    tokens = jax.random.randint(jax.random.key(1), (UPDATES, 8, 9), 0, 32, jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens[0])["params"]
    spec = relora.plan(shapes, relora.defaults(model.config), 2, 4.0)
    optimizer = relora.adamw(spec, relora.jagged(lambda t: 0.02, CYCLE, rewarmup=1))
    wrapped = relora.wrap(model, spec)

    def create(key: jax.Array) -> tuple[dict, dict, Any]:
        params = model.init(key, tokens[0])["params"]
        frozen, trainable = relora.init(params, spec, key=key)
        return frozen, trainable, optimizer.init(trainable)

    made = jax.eval_shape(create, jax.random.key(0))
    frozen, trainable, state = made
    axes = (
        relora.logical_axes(frozen, spec),
        relora.logical_axes(trainable, spec),
        relora.optimizer_axes(state, trainable, spec),
    )
    placed = sharding.shardings(made, mesh, axes)
    frozen, trainable, state = jax.jit(create, out_shardings=placed)(jax.random.key(0))

    def loss(trainable: dict, frozen: dict, tokens: jax.Array) -> jax.Array:
        logits, _ = wrapped.apply({"params": relora.combine(trainable, frozen)}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*placed[1:], None))
    def step(trainable: dict, state: Any, frozen: dict, tokens: jax.Array) -> tuple:
        value, grads = jax.value_and_grad(loss)(trainable, frozen, tokens)
        changes, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, changes), state, value

    losses, merges = [], 0
    for batch in tokens:
        trainable, state, value = step(trainable, state, frozen, jax.device_put(batch, sharding.batch_sharding(mesh)))
        losses.append(float(value))
        if relora.is_due(int(relora.applied_updates(state)), CYCLE, merges):
            own = jax.random.fold_in(jax.random.key(9), merges)
            frozen, trainable, state, _ = relora.merge_and_reset(frozen, trainable, state, own, spec=spec)
            merges += 1
    assert merges == 2
    assert jax.tree.map(lambda leaf: leaf.sharding, (frozen, trainable, state)) == placed
    return losses, jax.device_get(relora.export(frozen, trainable, spec))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}])
def test_eight_devices_do_what_one_does(sizes: dict[str, int]) -> None:
    losses, params = run(sharding.make_mesh(sharding.MeshConfig(**sizes)))
    alone, wanted = run(sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    assert min(alone) < alone[0]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-4), params, wanted)
