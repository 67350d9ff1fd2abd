"""A whole model with the kernels on and off: a training step, decoding, and the loss over some steps of both."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import ssm_jax
from benchmarks.gpu import clock
from ssm_jax.errors import ImplementationError
from ssm_jax.ops import dispatch, linear_cross_entropy

LEARNING_RATE, CLIP = 1e-3, 1.0


class Setup(NamedTuple):
    """A size, and what it is run on: rows x tokens of a training step, of a step of the loss curves, and lengths of decoding.

    The curves have shorter rows: what runs without kernels needs several launches a token. At least ``calls`` are timed.
    """

    size: dict[str, Any]
    train_batch: tuple[int, int] = (8, 2048)
    loss_batch: tuple[int, int] = (4, 512)
    loss_steps: int = 50
    prompt: int = 512
    new: int = 128
    decode_batches: tuple[int, ...] = (1, 64)
    calls: int = 3

    def model(self, **changes: Any) -> Any:
        return ssm_jax.build("mamba", **{**self.size, "dtype": "bfloat16", **changes})


MAMBA_130M = Setup({"vocab_size": 50280, "d_model": 768, "n_layers": 24})
TINY = Setup({"vocab_size": 32, "d_model": 8, "n_layers": 1, "d_state": 2}, (1, 4), (1, 4), 2, 3, 3, (1,), 1)


def implementations() -> dict[str, str | None]:
    """The arms, and why one of them cannot run."""
    arms: dict[str, str | None] = {}
    for name in ("triton", "xla"):
        try:
            dispatch.lookup("selective_scan", name)
            arms[name] = None
        except ImplementationError as error:
            arms[name] = str(error)
    return arms


@functools.cache
def step_of(model: Any) -> tuple[Any, Any]:
    """A jitted (params, moments, tokens [B, L+1]) -> (params, moments, loss), the first two donated; and the optimizer."""
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(LEARNING_RATE, weight_decay=0.01))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, moments: Any, tokens: Array) -> Any:
        def loss(params: Any) -> Array:
            features, _ = model.apply({"params": params}, tokens[:, :-1], method="features")
            weights = jnp.ones(tokens[:, 1:].shape, jnp.float32)
            total, weight = linear_cross_entropy(features, model.readout(params), tokens[:, 1:], weights)
            return total / weight

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value

    return step, optimizer


def init(model: Any) -> Any:
    """Parameters; for ``jax.eval_shape`` too."""
    return model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


_init = jax.jit(init, static_argnums=0)


def run(setup: Setup) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(what, arm, result) as it becomes known; the curves last."""
    arms = implementations()
    for name, reason in arms.items():
        for what, function in _measurements(setup):
            yield what, f"ssm_jax {name}", {"missing": reason} if reason else _attempt(function, name)
    yield "loss", "both", _attempt(lambda _: curves(setup, [name for name in arms if arms[name] is None]), "xla")


def _measurements(setup: Setup) -> Iterator[tuple[str, Callable[[str], dict[str, Any]]]]:
    yield "train", functools.partial(_train, setup)
    for batch in setup.decode_batches:
        yield f"decode, batch {batch}", functools.partial(_decode, setup, batch)


def _attempt(function: Callable[[str], dict[str, Any]], name: str) -> dict[str, Any]:
    """One arm that does not fit or does not compile must not take the others' numbers with it."""
    try:
        return function(name)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def _train(setup: Setup, name: str, budget: float = 10.0) -> dict[str, Any]:
    model = setup.model()
    step, optimizer = step_of(model)
    rows, length = setup.train_batch
    params = _init(model)
    moments = optimizer.init(params)
    tokens = jax.random.randint(jax.random.key(1), (rows, length + 1), 0, setup.size["vocab_size"])
    with dispatch.prefer(name):
        compiled = step.lower(params, moments, tokens).compile()

    def steps(count: int) -> float:
        nonlocal params, moments
        start = time.perf_counter()
        for _ in range(count):
            params, moments, value = compiled(params, moments, tokens)
        jax.block_until_ready(value)
        return (time.perf_counter() - start) / count

    steps(1)
    seconds = steps(max(setup.calls, min(50, int(budget / steps(1)))) if setup.calls > 1 else 1)
    return {"tokens_per_s": rows * length / seconds, "ms": 1e3 * seconds, **clock.memory(compiled)}


def _decode(setup: Setup, batch: int, name: str) -> dict[str, Any]:
    """Greedy tokens after a prompt; those of the steps alone from what they take beyond the first token."""
    model = setup.model(param_dtype="bfloat16")
    params = _init(model)
    prompt = np.random.default_rng(2).integers(0, setup.size["vocab_size"], (batch, setup.prompt))
    decoder = ssm_jax.generation.make_decoder(model, params)

    def seconds(count: int) -> float:
        times = []
        for _ in range(1 + setup.calls):
            start = time.perf_counter()
            ssm_jax.generate(model, params, prompt, max_new_tokens=count, decoder=decoder)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    with dispatch.prefer(name):
        return decoded(seconds(1), seconds(setup.new), batch, setup.new)


def decoded(first: float, whole: float, batch: int, new: int) -> dict[str, Any]:
    """Speed from the seconds of one new token and of ``new``; of the steps alone where the difference is one."""
    alone = {"steps_tokens_per_s": batch * (new - 1) / (whole - first)} if whole > first else {}
    return {"tokens_per_s": batch * new / whole, **alone, "prompt_ms": 1e3 * first, "ms": 1e3 * whole}


def curves(setup: Setup, arms: list[str]) -> dict[str, Any]:
    """Losses over the first steps from the same weights and batches; how far kernels part from the XLA form, and for comparison
    how far that parts from itself where only the order of sums changes: rows reversed, chunks of another size."""
    losses = {name: _losses(setup, name) for name in arms}
    losses["xla, other order"] = _losses(setup, "xla", reverse=True, chunk_size=48)
    apart = {
        name: float(np.abs(np.subtract(values, losses["xla"])).max())
        for name, values in losses.items()
        if name != "xla"
    }
    spread = apart["xla, other order"]
    ratio = apart["triton"] / spread if "triton" in apart and spread else None
    return {"losses": losses, "largest_difference_from_xla": apart, "kernels_over_spread": ratio}


def _losses(setup: Setup, name: str, reverse: bool = False, chunk_size: int | None = None) -> list[float]:
    model = setup.model(chunk_size=chunk_size)
    step, optimizer = step_of(model)
    params = _init(model)
    moments, losses = optimizer.init(params), []
    with dispatch.prefer(name):
        for tokens in _learnable(setup):
            params, moments, loss = step(params, moments, tokens[::-1] if reverse else tokens)
            losses.append(loss)
    return [float(loss) for loss in losses]


def _learnable(setup: Setup) -> Iterator[Array]:
    """Rows that count: every token is the one before plus 0, 1 or 2, in a small part of the vocabulary."""
    rows, length = setup.loss_batch
    rng = np.random.default_rng(3)
    for _ in range(setup.loss_steps):
        starts = rng.integers(0, setup.size["vocab_size"], (rows, 1))
        walk = starts + rng.integers(0, 3, (rows, length + 1)).cumsum(1)
        yield jnp.asarray(walk % min(setup.size["vocab_size"], 1024), jnp.int32)


def programs(setup: Setup, abstract: Callable[[Any], Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everything that ``run`` compiles for whole models: (name, how to compile it for a device that need not be there)."""
    from ssm_jax.generation import decoder as decoder_lib

    for name, reason in implementations().items():
        if reason:
            continue
        for label, (rows, length), changes in (
            ("train", setup.train_batch, {}),
            ("loss", setup.loss_batch, {}),
            ("loss, other order", setup.loss_batch, {"chunk_size": 48}),
        ):
            model = setup.model(**changes)
            step, optimizer = step_of(model)
            params = jax.eval_shape(functools.partial(init, model))
            tokens = jax.ShapeDtypeStruct((rows, length + 1), jnp.int32)
            arguments = abstract((params, jax.eval_shape(optimizer.init, params), tokens))
            yield f"{label}, {name}", functools.partial(_lower, name, step, *arguments)
        for batch in setup.decode_batches:
            model = setup.model(param_dtype="bfloat16")
            params = jax.eval_shape(functools.partial(init, model))
            decoder = jax.eval_shape(functools.partial(decoder_lib.make_decoder, model), params)
            state = jax.eval_shape(lambda model=model, batch=batch: model.init_state(batch, setup.prompt + setup.new))
            state_of_steps = jax.eval_shape(decoder_lib.unstack_state, decoder, state)
            tokens = jax.ShapeDtypeStruct((batch, setup.prompt), jnp.int32)
            one = jax.ShapeDtypeStruct((batch,), jnp.int32)
            read = jax.jit(lambda p, t, s, model=model: model.apply({"params": p}, t, s, method="features"))
            move = jax.jit(functools.partial(decoder_lib.decode_step, model))
            yield (
                f"prompt, batch {batch}, {name}",
                functools.partial(_lower, name, read, *abstract((params, tokens, state))),
            )
            arguments = abstract((decoder, one, state_of_steps))
            yield f"one token, batch {batch}, {name}", functools.partial(_lower, name, move, *arguments)


def _lower(name: str, function: Any, *arguments: Any) -> Any:
    with dispatch.prefer(name):
        return function.trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
