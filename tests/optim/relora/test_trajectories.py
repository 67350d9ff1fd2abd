"""Whole runs of the public code, replayed: losses, merges, resets, final weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ssm_jax
from ssm_jax.optim import relora
from tests.optim.relora import goldens, toy

MLP = [
    "traj_01_mlp_adamw_magnitude",
    "traj_03_mlp_sgd_momentum_main_init",
    "traj_06_mlp_warm_start",
    "traj_09_spike_default_eps",
]


def rate(case: dict[str, Any]) -> relora.schedules.Schedule:
    s = case["schedule"]
    return relora.jagged_cosine(
        case["peak_lr"],
        s["num_training_steps"],
        s["cycle_length"],
        s["first_warmup_steps"],
        s["restart_warmup_steps"],
        s["min_lr_ratio"],
    )


def direction(how: dict[str, Any]) -> optax.GradientTransformation:
    if how["name"] == "SGD":
        return optax.trace(how["momentum"])
    return optax.scale_by_adam(*how["betas"], how["eps"])


def optimizer(case: dict[str, Any], spec: relora.Spec) -> optax.GradientTransformation:
    how = case["optimizer"]
    decay, clip = how.get("weight_decay", 0.0), case["clip_grad_norm"]
    return relora.chain(spec, direction(how), rate(case), clip_norm=clip, weight_decay=decay, compat="reference")


def require_close(found: dict, wanted: dict, tolerance: float, what: str) -> None:
    found, wanted = relora.trees.flat(found), relora.trees.flat(wanted)
    for path in wanted:
        np.testing.assert_allclose(found[path], wanted[path], rtol=tolerance, atol=tolerance, err_msg=f"{what}: {path}")


def warm_start(case: dict[str, Any], values: dict[str, np.ndarray]) -> None:
    """Full-rank AdamW, with the usual epsilon, under its own cosine leaves the weights that the adapters then start from."""
    how, updates = case["optimizer"], case["start_update"]
    steps = optax.chain(
        relora.optimizer._clip_as_torch(case["clip_grad_norm"]),
        optax.scale_by_adam(*how["betas"]),
    )
    params = toy.combined(values, "warm_init.")
    state = steps.init(params)

    @jax.jit
    def step(params: dict, state: Any, x: jax.Array, y: jax.Array, lr: jax.Array) -> tuple:
        def mean(params: dict) -> jax.Array:
            return jnp.mean(jnp.square(toy.MODEL.apply({"params": params}, x) - y))

        loss, grads = jax.value_and_grad(mean)(params)
        changes, state = steps.update(grads, state, params)
        return jax.tree.map(lambda p, u: p - lr * u, params, changes), state, loss

    for i in range(updates):
        row = case["log"][i]
        batch = (jnp.asarray(values[f"warm_data.{i}.{name}"]) for name in "xy")
        params, state, loss = step(params, state, *batch, row["lr"])
        np.testing.assert_allclose(loss, row["loss"], rtol=1e-10)
    require_close(params, toy.combined(values, "warm_final."), 1e-9, "after the warm start")
    frozen, trainable, _ = relora.from_full_rank(params, toy.WRAPPED, case["r"], float(case["alpha"]))
    x = jnp.asarray(values["data.0.x"])
    wrapped = relora.wrap(toy.MODEL, relora.plan(params, toy.WRAPPED, case["r"], float(case["alpha"])))
    after = wrapped.apply({"params": relora.combine(trainable, frozen)}, x)
    np.testing.assert_allclose(after, toy.MODEL.apply({"params": params}, x), rtol=1e-12)


@pytest.mark.parametrize("name", MLP)
def test_runs_of_the_reference_in_float64(name: str) -> None:
    case, values = goldens.settings(name), goldens.tensors(name)
    with jax.enable_x64(True):
        if case["start_update"]:
            warm_start(case, values)
        start = toy.combined(values, "init.")
        plain = relora.trees.nested({p: x for p, x in relora.trees.flat(start).items() if ":" not in p})
        compat = "reference" if case["variant"] == "main" else None
        _, ours, spec = relora.split(plain, toy.WRAPPED, case["r"], float(case["alpha"]), compat=compat)
        assert spec.scale == case["scale"]
        frozen, trainable = relora.partition(start, spec)
        assert jax.tree.structure(ours) == jax.tree.structure(trainable)
        for leaf in spec.leaves:
            for path in (leaf.a_path, leaf.b_path):
                drawn, theirs = (relora.trees.flat(tree)[path] for tree in (ours, trainable))
                assert np.any(drawn != 0) == np.any(theirs != 0)
        wrapped, steps = relora.wrap(toy.MODEL, spec), optimizer(case, spec)
        state = steps.init(trainable)

        @jax.jit
        def step(trainable: dict, frozen: dict, state: Any, x: jax.Array, y: jax.Array) -> tuple:
            loss, grads = jax.value_and_grad(functools.partial(toy.loss, wrapped))(trainable, frozen, x, y)
            changes, state = steps.update(grads, state, trainable)
            return optax.apply_updates(trainable, changes), state, loss, optax.tree.norm(grads)

        cycle, merges = case["merge_every"], 0
        for n, row in enumerate(case["log"][case["start_update"] :], start=1):
            batch = (jnp.asarray(values[f"data.{n - 1}.{name}"]) for name in "xy")
            before = relora.trees.flat(trainable)
            trainable, state, loss, norm = step(trainable, frozen, state, *batch)
            np.testing.assert_allclose(loss, row["loss"], rtol=1e-10)
            np.testing.assert_allclose(norm, row["grad_norm_before_clip"], rtol=1e-9)
            if row["lr"]:
                after = relora.trees.flat(trainable)
                change = max(float(jnp.abs(after[p] - before[p]).max()) for p in spec.adapters) / row["lr"]
                np.testing.assert_allclose(change, row["largest_adapter_change_over_lr"], rtol=1e-6, atol=1e-12)
            if "merge" in row["events"]:
                assert n == (merges + 1) * cycle + 1, "one update late, at rate 0, as the reference does"
                key = jax.random.fold_in(jax.random.key(0), merges)
                how = {"method": "reference", "keep": 1 - case["prune_ratio"]}
                frozen, trainable, state, _ = relora.merge_and_reset(frozen, trainable, state, key, spec=spec, **how)
                recorded = relora.trees.flat(toy.combined(values, f"merge.{merges}."))
                for path, wanted in recorded.items():
                    if path.endswith("kernel"):
                        np.testing.assert_allclose(relora.trees.flat(frozen)[path], wanted, rtol=1e-9, atol=1e-10)
                redrawn = {path: a for path, a in recorded.items() if path.endswith(":a")}
                trainable = relora.trees.nested({**relora.trees.flat(trainable), **redrawn})
                require_state(state, values, f"opt_after.{merges}.", case["state_keys"], list(spec.adapters))
                merges += 1
        assert int(relora.applied_updates(state)) == n
        require_close(relora.combine(trainable, frozen), toy.combined(values, "final."), 1e-9, "final")
        require_state(state, values, "opt_final.", case["state_keys"], list(relora.trees.flat(trainable)))
    if name == "traj_09_spike_default_eps":
        assert change > 1e6, "what is replayed here is the defect"


def require_state(state: Any, values: dict, prefix: str, kinds: list[str], params: list[str]) -> None:
    leaves = jax.tree.leaves(state)
    for i, kind in enumerate(kinds):
        wanted = relora.trees.flat(toy.combined(values, f"{prefix}{kind}."))
        for path in params:
            slot = relora.slots.slots(state, {path: None})[i]
            np.testing.assert_allclose(
                leaves[slot.index], wanted[path], rtol=1e-8, atol=1e-12, err_msg=f"{kind} {path}"
            )


LLAMA = {
    "self_attn.q_proj": "mixer/q_proj", "self_attn.k_proj": "mixer/k_proj", "self_attn.v_proj": "mixer/v_proj",
    "self_attn.o_proj": "mixer/out_proj", "mlp.gate_proj": "mlp/gate_proj", "mlp.up_proj": "mlp/up_proj",
    "mlp.down_proj": "mlp/down_proj",
}  # fmt: skip
NORMS = {"input_layernorm": "norm/scale", "post_attention_layernorm": "mlp_norm/scale"}


def llama(values: dict[str, np.ndarray], prefix: str, spec_shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """The file's LLaMA tensors under a prefix as our leaves, layers stacked."""
    outer = {
        "model.embed_tokens.weight": "embed/embedding",
        "model.norm.weight": "norm_f/scale",
        "lm_head.weight": "head/kernel",
    }
    leaves: dict[str, Any] = {}
    for theirs, ours in outer.items():
        if prefix + theirs in values:
            x = values[prefix + theirs]
            leaves[ours] = x.T if ours == "head/kernel" else x
    parts = {f"{module}.{kind}weight": f"layers/{ours}/kernel{suffix}" for module, ours in LLAMA.items()
             for kind, suffix in (("", ""), ("lora_A.", ":a"), ("lora_B.", ":b"))}  # fmt: skip
    parts |= {f"{norm}.weight": f"layers/{ours}" for norm, ours in NORMS.items()}
    for theirs, ours in parts.items():
        layers = [values.get(f"{prefix}model.layers.{i}.{theirs}") for i in range(2)]
        if layers[0] is not None:
            leaves[ours] = np.stack([x.T if x.ndim == 2 else x for x in layers])
    return {path: jnp.asarray(x).reshape(spec_shapes[path]) for path, x in leaves.items()}


def test_a_llama_run_of_the_reference() -> None:
    """Our stacked, scanned model: pruning goes by layer, as the reference's tensors do."""
    name = "traj_07_llama_adamw_magnitude"
    case, values = goldens.settings(name), goldens.tensors(name)
    m = case["model"]
    fields = {"vocab_size": m["vocab"], "d_model": m["hidden"], "d_mlp": m["intermediate"], "n_layers": m["layers"]}
    model = ssm_jax.build("llama", n_heads=m["heads"], norm_eps=m["rms_norm_eps"], **fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    spec = relora.plan(shapes, relora.defaults(model.config), case["r"], float(case["alpha"]))
    assert sorted(leaf.path for leaf in spec.leaves) == sorted(f"layers/{ours}/kernel" for ours in LLAMA.values())
    _, adapters = jax.eval_shape(functools.partial(relora.init, spec=spec), shapes)
    sizes = {path: leaf.shape for path, leaf in {**relora.trees.flat(shapes), **relora.trees.flat(adapters)}.items()}
    frozen, trainable = relora.partition(relora.trees.nested(llama(values, "init.", sizes)), spec)
    wrapped, steps = relora.wrap(model, spec), optimizer(case, spec)
    state = steps.init(trainable)

    def mean_loss(trainable: dict, frozen: dict, tokens: jax.Array) -> jax.Array:
        logits, _ = wrapped.apply({"params": relora.combine(trainable, frozen)}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    @jax.jit
    def step(trainable: dict, frozen: dict, state: Any, tokens: jax.Array) -> tuple:
        loss, grads = jax.value_and_grad(mean_loss)(trainable, frozen, tokens)
        changes, state = steps.update(grads, state, trainable)
        return optax.apply_updates(trainable, changes), state, loss

    merges = 0
    for n, row in enumerate(case["log"], start=1):
        tokens = jnp.asarray(values[f"data.{n - 1}.input_ids"])
        trainable, state, loss = step(trainable, frozen, state, tokens)
        np.testing.assert_allclose(loss, row["loss"], rtol=2e-5)
        if "merge" in row["events"]:
            how = {"method": "reference", "keep": 1 - case["prune_ratio"]}
            frozen, trainable, state, _ = relora.merge_and_reset(
                frozen, trainable, state, jax.random.key(n), spec=spec, **how
            )
            redrawn = llama(values, f"merge.{merges}.", sizes)
            trainable = relora.trees.nested({**relora.trees.flat(trainable), **redrawn})
            merges += 1
    assert merges == 2
    wanted = relora.trees.nested(llama(values, "final.", sizes))
    found, wanted = relora.trees.flat(relora.combine(trainable, frozen)), relora.trees.flat(wanted)
    assert found.keys() == wanted.keys()
    for path in wanted:
        np.testing.assert_allclose(found[path], wanted[path], rtol=0, atol=2e-5, err_msg=path)
