"""Whole models on the kernels, interpreted: a few updates with them and without give the same losses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ssm_jax
from ssm_jax.ops import dispatch, triton_call
from ssm_jax.ops.cross_entropy import cross_entropy

UPDATES, LANES, LENGTH, VOCABULARY = 3, 2, 24, 32
SIZES: dict[str, dict[str, Any]] = {
    "mamba": {"d_model": 16, "n_layers": 1},
    "mamba2": {"d_model": 16, "n_layers": 1, "headdim": 8, "d_state": 8},
    "retnet": {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_value": 16, "d_mlp": 16},
    "dense_retnet": {
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 2,
        "dense_layers": 1,
        "key_gate_ratio": 8,
        "value_gate_ratio": 8,
    },
}


def losses(family: str, implementation: str) -> list[float]:
    model = ssm_jax.build(family, vocab_size=VOCABULARY, **SIZES[family])
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, VOCABULARY, (LANES, LENGTH + 1)), jnp.int32)
    positions = jnp.asarray(np.stack([np.arange(LENGTH), np.r_[np.arange(7), np.arange(LENGTH - 7)]]), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens[:, :1])["params"]
    optimizer = optax.adam(1e-2)
    moments = optimizer.init(params)

    @jax.jit
    def update(params: Any, moments: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            logits, _ = model.apply({"params": params}, tokens[:, :-1], positions=positions)
            total, weight = cross_entropy(logits, tokens[:, 1:], jnp.ones((LANES, LENGTH)))
            return total / weight

        value, gradients = jax.value_and_grad(loss)(params)
        changes, after = optimizer.update(gradients, moments)
        return optax.apply_updates(params, changes), after, value

    found = []
    with dispatch.prefer(implementation), triton_call.recorded() as launches:
        for _ in range(UPDATES):
            params, moments, value = update(params, moments)
            found.append(float(value))
    assert bool(launches) == (implementation == "triton")
    return found


@pytest.mark.parametrize("family", SIZES)
def test_losses_are_those_without_kernels(family: str) -> None:
    with_kernels, without = (losses(family, name) for name in ("triton", "xla"))
    np.testing.assert_allclose(with_kernels, without, rtol=2e-6)
    assert with_kernels[-1] < with_kernels[0]
