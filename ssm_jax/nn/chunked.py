"""A stack of layers that reads its input chunk by chunk, with pause tokens and a recurrent memory between chunks.

Pauses are learned vectors among the tokens (Goyal et al. 2023, arXiv:2310.02226); memory is a few rows that each chunk reads at its
beginning and writes at its end (Bulatov et al. 2022, arXiv:2207.06881). All lanes have one static shape; what a lane does not have
is masked, and each may stand anywhere in its own chunk.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from ssm_jax.nn import positions as positions_lib
from ssm_jax.nn.block import REMAT_POLICIES
from ssm_jax.nn.chunk_layer import ChunkLayer, no_cache
from ssm_jax.nn.chunk_pieces import Flow, Read, Reader, Run, begins_within
from ssm_jax.nn.slots import ChunkShape, Slots
from ssm_jax.nn.state import ChunkedState, clear_lanes, stack_layers
from ssm_jax.nn.step_forward import TAPS
from ssm_jax.typing import Activations, Key, Params, Positions, PyTree


class ChunkUnit(nn.Module):
    """Layers one after another, the unit that is stacked and scanned."""

    members: tuple[ChunkLayer, ...]

    @nn.nowrap
    def init_state(self, batch_size: int, width: int) -> PyTree:
        """Each member's state before any token."""
        return tuple(member.init_state(batch_size, width) for member in self.members)

    @nn.compact
    def __call__(
        self, stream: PyTree, state: PyTree, slots: Slots, step_kernel: Array | None, deterministic: bool
    ) -> tuple[PyTree, PyTree]:
        """``stream``: the residual stream, and the cache that the first member finds below it (None where none is read)."""
        h_BTD, below = stream
        states = []
        for member, old in zip(self.members, state, strict=True):
            h_BTD, new, own = member(h_BTD, old, slots, below, step_kernel, deterministic)
            below = own if member.cache == "below" else None
            states.append(new)
        return (h_BTD, below), tuple(states)


class ChunkedStack(nn.Module):
    """Chunks of ``shape.n_ctx`` tokens, one after the other through all layers.

    Attributes:
        units: the repeating unit, ``repeats`` times; None for none. rest: the layers after the last whole unit.
        width: D.
        head: whether the first rows of a chunk's output become the memory; else its last, those of the write slots.
        step_init: initialiser of one matrix for the steps of all layers; None where each has its own, or none.
        remat, unroll: as in ``scan_layers``.
    """

    shape: ChunkShape
    units: ChunkUnit | None
    rest: ChunkUnit | None
    repeats: int
    width: int
    head: bool = False
    step_init: Initializer | None = None
    remat: str = "none"
    unroll: int = 1
    param_dtype: Dtype = jnp.float32

    @nn.nowrap
    def init_state(self, batch_size: int) -> ChunkedState:
        """The state before any token: zeros, of one size."""
        layers = {
            name: stack_layers(unit.init_state(batch_size, self.width), count)
            for name, unit, count in (("units", self.units, self.repeats), ("rest", self.rest, 1))
            if unit is not None
        }

        def rows(wanted: bool) -> Any:  # each an array of its own, so that a state can be donated
            return jnp.zeros((batch_size, self.shape.memory, self.width), jnp.float32) if wanted else None

        has_memory = bool(self.shape.memory)
        position_B = jnp.zeros((batch_size,), jnp.int32)
        return ChunkedState(layers, position_B, rows(has_memory), rows(has_memory and self.head))

    def setup(self) -> None:
        normal, rows = nn.initializers.normal(1.0), (self.shape.memory, self.width)
        self.pause = self.param("pause", normal, (self.width,), self.param_dtype) if self.shape.pauses else None
        self.memory = self.param("memory", normal, rows, self.param_dtype) if self.shape.memory else None
        self.step = None if self.step_init is None else self.param("step", self._step_kernel)

    @nn.nowrap
    def _step_kernel(self, key: Key) -> Float[Array, "K D E"]:
        """Its fan-in is that of the four inputs together."""
        assert self.step_init is not None
        kernel = self.step_init(key, (TAPS * self.width, self.width), self.param_dtype)
        return jnp.asarray(kernel).reshape(TAPS, self.width, self.width)

    def __call__(
        self,
        h_BLD: Activations,
        state: ChunkedState | None = None,
        positions: Positions | None = None,
        deterministic: bool = True,
    ) -> tuple[Activations, ChunkedState]:
        """The stream after the last layer, pauses and memory cut out, and the state.

        A document begins with a call: a row in which position 0 stands behind the first column is NaN.
        """
        batch, length, _ = h_BLD.shape
        reader, flow = Reader(self.shape, self.head, self.pause, self.memory), _flow(self, deterministic)
        before = self.init_state(batch) if state is None else state
        counts_B = positions_lib.lengths(positions)
        tokens_B = jnp.full((batch,), length, jnp.int32) if counts_B is None else counts_B
        if self.is_initializing():  # parameters depend on no input: one token through every layer makes them
            reading = (h_BLD[:, :1], jnp.ones((batch,), jnp.int32), before)
            reader.piece(flow.run, reading, slots=self.shape.slots_for(1), from_start=True)
            return h_BLD, before
        if positions is not None and state is not None:
            before = clear_lanes(before, positions[:, 0] == 0)
        from_start = state is None or self.shape.close_calls
        out_BLD, after = reader.call(flow, h_BLD, tokens_B, before, from_start=from_start, ragged=positions is not None)
        if positions is not None:
            out_BLD = jnp.where(begins_within(positions)[:, None, None], jnp.nan, out_BLD)
        return out_BLD, after

    @nn.nowrap
    def step_apart(
        self, params: Params, apart: tuple[Params, ...], h_B1D: Activations, state: ChunkedState
    ) -> tuple[Activations, ChunkedState]:
        """One token per lane with the parameters, and the states, of each unit held apart. For decoding."""
        units = [unit for unit in (*[self.units] * self.repeats, self.rest) if unit is not None]

        def run(h_BTD: Activations, states: PyTree, slots: Slots) -> tuple[Activations, PyTree]:
            stream: PyTree = (h_BTD, _nothing_below(units[0], states[0]))
            after = []
            for unit, own, old in zip(units, apart, states, strict=True):
                stream, new = unit.apply({"params": own}, stream, old, slots, params.get("step"), True)
                after.append(new)
            return stream[0], tuple(after)

        def cond(which: Array, if_true: Read, if_false: Read, argument: Any) -> Any:
            return jax.lax.cond(which, lambda a: if_true(run, a), lambda a: if_false(run, a), argument)

        reader = Reader(self.shape, self.head, params.get("pause"), params.get("memory"))
        return reader.one_token(cond, h_B1D, jnp.ones((len(h_B1D),), jnp.int32), state)


def _flow(module: ChunkedStack, deterministic: bool) -> Flow:
    """Layers, branches and loops of a bound module, by Flax's lifted transformations."""

    def cond(which: Array, if_true: Read, if_false: Read, argument: Any) -> Any:
        def branch(read: Read) -> Any:
            return lambda module, argument: read(_run(module, deterministic), argument)

        return nn.cond(which, branch(if_true), branch(if_false), module, argument)

    def scan(body: Any, carry: Any, inputs: Any) -> Any:
        lifted = nn.scan(
            lambda module, carry, inputs: body(_flow(module, deterministic), carry, inputs),
            variable_broadcast="params",
            split_rngs={"params": False, "dropout": True},
        )
        return lifted(module, carry, inputs)

    return Flow(_run(module, deterministic), cond, scan)


def _run(module: ChunkedStack, deterministic: bool) -> Run:
    def run(h_BTD: Activations, states: PyTree, slots: Slots) -> tuple[Activations, PyTree]:
        def body(unit: ChunkUnit, stream: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
            return unit(stream, state, slots, module.step, deterministic)

        policy = REMAT_POLICIES.get(module.remat)
        remat = body if module.remat == "none" else nn.remat(body, prevent_cse=False, policy=policy)
        after: dict[str, PyTree] = {}
        stream: PyTree = None
        for name, unit, count in (("units", module.units, module.repeats), ("rest", module.rest, 1)):
            if unit is None:
                continue
            if stream is None:
                first = jax.tree.map(lambda leaf: leaf[0], states[name])
                stream = (h_BTD, _nothing_below(unit, first))
            scan = nn.scan(
                remat,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=0,
                out_axes=0,
                length=count,
                unroll=module.unroll,
            )
            stream, after[name] = scan(unit, stream, states[name])
        return stream[0], after

    return run


def _nothing_below(unit: ChunkUnit, state: PyTree) -> Any:
    return no_cache(state[0].attention) if unit.members[0].cache == "below" else None
