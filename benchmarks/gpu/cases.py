"""What is measured: each case an op at one shape, with its floors, inputs, oracle and implementations.

A new kernel registers under its op and is measured at once; a new op is one more function here, in ``floors`` and in ``oracle``,
and its PyTorch baselines in ``torch_side``.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.gpu import floors, oracle
from ssm_jax.errors import ImplementationError
from ssm_jax.ops import dispatch, retention, selective_scan

Inputs = dict[str, Array]
Run = Callable[[Inputs], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """An op at one shape.

    walks: by pass: "forward", "forward+backward" or "step".
    inputs: from a key; the same for every implementation.
    run: the op, with ``implementation=``. implementations: names to try in it. others: what is no implementation of the op.
    cotangent: of the output, and, where asked, zero outside the channels that the oracle looks at.
    expected, looked_at: the oracle's numbers for these inputs and this cotangent, and the same part of what an implementation gave.
    baselines: rows that the PyTorch side fills.
    """

    title: str
    op: str
    shape: tuple[int, ...]
    walks: Mapping[str, tuple[floors.Walk, ...]]
    inputs: Callable[[Array], Inputs]
    run: Callable[..., Any]
    expected: Callable[[Inputs, Array], oracle.Arrays]
    looked_at: Callable[[Any, Inputs | None], oracle.Arrays]
    cotangent: Callable[[Array, bool], Array]
    implementations: tuple[str, ...] = ("triton", "xla")
    others: Mapping[str, Run] = dataclasses.field(default_factory=dict)
    baselines: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.title} {self.shape}"

    def contestants(self) -> dict[str, Run | str]:
        """Functions of the inputs by row; in place of one that cannot run, why."""
        rows: dict[str, Run | str] = {}
        for name in self.implementations:
            try:
                dispatch.lookup(self.op, name)
                rows[f"ssm_jax {name}"] = functools.partial(self.run, implementation=name)
            except ImplementationError as error:
                rows[f"ssm_jax {name}"] = str(error)
        return {**rows, **self.others}


def program(run: Run, passes: str) -> Callable[[Inputs, Array], Any]:
    """(inputs, dy) to the output, and with "backward" in the name of the pass to the output and the gradients."""
    if "backward" not in passes:
        return lambda inputs, dy: run(inputs)

    def both(inputs: Inputs, dy: Array) -> tuple[Array, Inputs]:
        y, pull = jax.vjp(run, inputs)
        return y, pull(dy)[0]

    return both


SCANS = ((8, 2048, 4096, 16), (8, 2048, 1536, 16), (2, 2048, 2048, 16), (1, 8192, 4096, 16), (1, 32768, 2048, 16))
STEPS = ((1, 4096, 16), (64, 4096, 16), (512, 4096, 16))
RETENTIONS = (
    (1, 8192, 96, 128, 128), (2, 16384, 16, 128, 128), (4, 4096, 64, 128, 128), (4, 2048, 16, 128, 128),
    (8, 2048, 32, 256, 256), (4, 4096, 8, 256, 512),
)  # fmt: skip
TINY_SCANS, TINY_STEPS, TINY_RETENTIONS = ((1, 5, 20, 2),), ((2, 10, 2),), ((1, 20, 2, 8, 16),)


def all_cases(tiny: bool = False) -> list[Case]:
    """Everything; ``tiny``: the same at shapes that an interpreter can run."""
    scans, steps, retentions = (TINY_SCANS, TINY_STEPS, TINY_RETENTIONS) if tiny else (SCANS, STEPS, RETENTIONS)
    return [*map(_scan, scans), *map(_step, steps), *map(_retention, retentions)]


def _scan(shape: tuple[int, ...]) -> Case:
    batch, length, channels, entries = shape
    seen = oracle.some(channels)

    def inputs(key: Array) -> Inputs:
        return _scan_inputs(key, (batch, length), channels, entries)

    def run(inputs: Inputs, implementation: str | None) -> Array:
        arguments = {_SCAN_NAMES[name]: array for name, array in inputs.items()}
        return selective_scan(**arguments, implementation=implementation)[0]

    def expected(inputs: Inputs, dy: Array) -> oracle.Arrays:
        part = {**_channels(inputs, seen), **_wide({name: inputs[name] for name in "BC"})}
        return oracle.selective_scan(**part, dy=_wide({"dy": dy[..., seen]})["dy"])

    def looked_at(y: Array, gradients: Inputs | None) -> oracle.Arrays:
        found = _wide({"y": y[..., seen]})
        if gradients is None:
            return found
        return {**found, **_channels(gradients, seen), **_wide({name: gradients[name] for name in "BC"})}

    return Case(
        "scan", "selective_scan", shape, floors.selective_scan(*shape), inputs, run, expected, looked_at,
        functools.partial(_cotangent, shape=(batch, length, channels), axis=2, seen=seen),
        others={"XLA associative scan": _associative_scan},
        baselines=("mamba_ssm", "mamba_ssm with transposes"),
    )  # fmt: skip


_SCAN_NAMES = {
    "x": "x_BLE", "dt": "dt_BLE", "A": "A_EN", "B": "B_BLN", "C": "C_BLN", "D": "D_E", "dt_bias": "dt_bias_E",
}  # fmt: skip


def _scan_inputs(key: Array, rows: tuple[int, ...], channels: int, entries: int) -> Inputs:
    """Steps between 0.001 and 0.3, rates of 1 to N: what a model begins with."""
    keys = iter(jax.random.split(key, 8))

    def normal(*shape: int) -> Array:
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    return {
        "x": normal(*rows, channels),
        "dt": normal(*rows, channels) - jnp.bfloat16(4),
        "A": -jnp.tile(jnp.arange(1, entries + 1, dtype=jnp.float32), (channels, 1)),
        "B": normal(*rows, entries),
        "C": normal(*rows, entries),
        "D": jnp.ones(channels, jnp.float32) + normal(channels).astype(jnp.float32) / 8,
        "dt_bias": normal(channels).astype(jnp.float32) / 8,
    }


def _channels(arrays: Inputs, seen: np.ndarray) -> oracle.Arrays:
    return _wide({name: arrays[name][..., seen] for name in ("x", "dt", "D", "dt_bias")} | {"A": arrays["A"][seen]})


def _associative_scan(inputs: Inputs) -> Array:
    """What JAX offers out of the box: decays and inputs as [B, L, E, N], scanned by ``jax.lax.associative_scan``."""
    x, dt, B, C = (inputs[name].astype(jnp.float32) for name in ("x", "dt", "B", "C"))
    delta = jax.nn.softplus(dt + inputs["dt_bias"])
    decay = jnp.exp(delta[..., None] * inputs["A"])
    added = (delta * x)[..., None] * B[:, :, None]

    def then(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
        return one[0] * other[0], other[0] * one[1] + other[1]

    _, h = jax.lax.associative_scan(then, (decay, added), axis=1)
    return (jnp.einsum("blen,bln->ble", h, C) + inputs["D"] * x).astype(inputs["x"].dtype)


def _step(shape: tuple[int, ...]) -> Case:
    batch, channels, entries = shape

    def inputs(key: Array) -> Inputs:
        state = jax.random.normal(jax.random.fold_in(key, 1), (batch, entries, channels), jnp.float32)
        return {**_scan_inputs(key, (batch, 1), channels, entries), "state": state}

    def run(inputs: Inputs, implementation: str | None) -> dict[str, Array]:
        arguments = {_SCAN_NAMES.get(name, name): array for name, array in inputs.items()}
        y, state = selective_scan(**arguments, implementation=implementation)
        return {"y": y, "state": state}

    def expected(inputs: Inputs, dy: Array) -> oracle.Arrays:
        one = {name: array[:, 0] if name in ("x", "dt", "B", "C") else array for name, array in inputs.items()}
        return oracle.scan_step(**_wide({**one, "state": one["state"].swapaxes(1, 2)}))

    def looked_at(out: dict[str, Array], gradients: Inputs | None) -> oracle.Arrays:
        return _wide({"y": out["y"][:, 0], "state": out["state"].swapaxes(1, 2)})

    return Case(
        "scan step", "selective_scan", shape, floors.scan_step(*shape), inputs, run, expected, looked_at,
        lambda key, masked: jnp.zeros((), jnp.bfloat16), baselines=("mamba_ssm",),
    )  # fmt: skip


def _retention(shape: tuple[int, ...]) -> Case:
    """Queries and keys as they are, no scale by the token's place: what flash-linear-attention computes with ``scale=1``."""
    batch, length, heads, keys, values = shape
    lane, head = batch - 1, heads // 2
    log_decay = np.log1p(-(2.0 ** (-5.0 - np.arange(heads))))

    def inputs(key: Array) -> Inputs:
        one, two, three = jax.random.split(key, 3)
        q = jax.random.normal(one, (batch, length, heads, keys), jnp.bfloat16) * jnp.bfloat16(keys**-0.5)
        k = jax.random.normal(two, (batch, length, heads, keys), jnp.bfloat16)
        return {"q": q, "k": k, "v": jax.random.normal(three, (batch, length, heads, values), jnp.bfloat16)}

    def run(inputs: Inputs, implementation: str | None) -> Array:
        arrays = (inputs[name] for name in "qkv")
        decay = jnp.asarray(log_decay, jnp.float32)
        return retention(*arrays, decay, score_scale=False, implementation=implementation)[0]

    def expected(inputs: Inputs, dy: Array) -> oracle.Arrays:
        part = _wide({name: array[lane, :, head] for name, array in {**inputs, "dy": dy}.items()})
        return oracle.retention(**part, log_decay=log_decay[head])

    def looked_at(y: Array, gradients: Inputs | None) -> oracle.Arrays:
        return _wide({name: array[lane, :, head] for name, array in {"y": y, **(gradients or {})}.items()})

    return Case(
        "retention", "retention", shape, floors.retention(*shape), inputs, run, expected, looked_at,
        functools.partial(_cotangent, shape=(batch, length, heads, values), axis=2, seen=np.arange(heads)),
        baselines=("fla chunk", "fla fused_chunk"),
    )  # fmt: skip


def _cotangent(key: Array, masked: bool, *, shape: tuple[int, ...], axis: int, seen: np.ndarray) -> Array:
    dy = jax.random.normal(key, shape, jnp.bfloat16)
    if not masked:
        return dy
    mask = np.zeros([size if i == axis else 1 for i, size in enumerate(shape)], bool)
    np.put_along_axis(mask, seen.reshape([-1 if i == axis else 1 for i in range(len(shape))]), True, axis)
    return jnp.where(mask, dy, 0)


def _wide(arrays: Inputs) -> oracle.Arrays:
    return {name: np.asarray(array, dtype=np.float64) for name, array in arrays.items()}
