"""BakaLLM's tensor names, and which of our leaves make up each tensor."""

import re
from typing import Any

import numpy as np

from ssm_jax.interop.tensor_map import Part, TensorMap, depthwise, linear, same, vector
from ssm_jax.models import BakaConfig
from ssm_jax.nn.rotary import geometric

EMBEDDING, HEAD = "vocab_in.weight", "vocab_out.weight"
PAUSE, MEMORY, SHARED_STEP = "model.pause.pause_emb", "model.rmt.rmt_tokens", "model.step_forward.step.weight"
FIRST = "model.layers.0."


def _interleaved(leaf: str) -> Part:
    """A kernel [D, H, P] that makes queries or keys whose halves are turned together; in torch neighbours are."""

    def to_torch(w: Any) -> Any:
        width, heads, size = w.shape
        return w.reshape(width, heads, 2, size // 2).transpose(1, 3, 2, 0).reshape(-1, width)

    def from_torch(block: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        width, heads, size = shape
        return block.reshape(heads, size // 2, 2, width).transpose(3, 0, 2, 1).reshape(shape)

    return Part(leaf, to_torch, from_torch)


def _layer(number: str, ours: str, gated: bool) -> TensorMap:
    """Tensors of the layers of one stack. ``number``: of a layer, such as "{i}"; ``ours``: where our leaves are.

    x_proj holds rows [dt | B | C].
    """
    base = "base." if gated else ""
    mamba = ours + "mamba/"
    named: dict[str, tuple[Part, ...]] = {
        "norm_in.weight": (vector(ours + "norm/scale"),),
        "norm_in.bias": (vector(ours + "norm/bias"),),
        f"attn.{base}q.weight": (_interleaved(ours + "mixer/q_proj/kernel"),),
        f"attn.{base}k.weight": (_interleaved(ours + "mixer/k_proj/kernel"),),
        f"attn.{base}v.weight": (linear(ours + "mixer/v_proj/kernel"),),
        f"attn.{base}o.weight": (linear(ours + "mixer/out_proj/kernel", inputs=2),),
        **{
            f"mlp.{base}fc_{name}.weight": (linear(f"{ours}mlp/{name}_proj/kernel"),) for name in ("gate", "up", "down")
        },
        f"step_forward.{base}step.weight": (linear(ours + "step/proj/kernel", inputs=2),),
        "norm_mamba.weight": (vector(ours + "mamba_norm/scale"),),
        "norm_mamba.bias": (vector(ours + "mamba_norm/bias"),),
        "mamba.in_proj.weight": (linear(mamba + "in_proj/kernel"),),
        "mamba.conv1d.weight": (depthwise(mamba + "conv/kernel"),),
        "mamba.conv1d.bias": (vector(mamba + "conv/bias"),),
        "mamba.x_proj.weight": tuple(linear(f"{mamba}{name}/kernel") for name in ("dt_down", "B_proj", "C_proj")),
        "mamba.dt_proj.weight": (linear(mamba + "dt_up/kernel"),),
        "mamba.dt_proj.bias": (vector(mamba + "dt_bias"),),
        "mamba.A_log": (same(mamba + "A_log"),),
        "mamba.D": (vector(mamba + "D"),),
        "mamba.out_proj.weight": (linear(mamba + "out_proj/kernel"),),
    }
    if gated:
        branches = {"attn": "mixer", "mlp": "mlp", "step_forward": "step"}
        named |= {f"{name}.fc_gate.weight": (linear(f"{ours}{leaf}_gate/kernel"),) for name, leaf in branches.items()}
    return {f"model.layers.{number}.{name}": parts for name, parts in named.items()}


TENSORS: TensorMap = {
    EMBEDDING: (same("embed/embedding"),),
    PAUSE: (vector("layers/pause"),),
    MEMORY: (same("layers/memory"),),
    SHARED_STEP: (linear("layers/step", inputs=2),),
    **_layer("{i}", "layers/units/members_0/", gated=False),
    "norm_out.weight": (vector("norm_f/scale"),),
    "norm_out.bias": (vector("norm_f/bias"),),
    HEAD: (linear("head/kernel"),),
}


def variants(config: BakaConfig) -> TensorMap:
    """Tensors of the layers, as ``TENSORS`` has them without gates and with a Mamba in each.

    Where not every layer has a Mamba, a stack for each place in a unit, and one for each layer after the last whole unit.
    """
    size, gated = config.mamba_every or 1, config.gate != "none"
    repeats, rest = divmod(config.n_layers, size)
    found: dict[str, tuple[Part, ...]] = {name: () for name in TENSORS if "{i}" in name}
    for m in range(size if repeats else 0):
        number = f"{{i:{size}+{m}}}" if size > 1 else "{i}"
        found |= _layer(number, f"layers/units/members_{m}/", gated)
    for m in range(rest):
        found |= _layer(f"{{i:1+{repeats * size + m}}}", f"layers/rest/members_{m}/", gated)
    return found


def buffers(config: BakaConfig) -> dict[str, np.ndarray]:
    """Radians per place of every pair."""
    angles = geometric(config.d_attn_resolved // config.n_heads, config.rope_base).astype(np.float32)
    base = "" if config.gate == "none" else "base."
    return {f"model.layers.{i}.attn.{base}rot.freqs": angles for i in range(config.n_layers)}


def uncompiled(name: str) -> str:
    """Without what torch.compile puts into names."""
    return name.replace("_orig_mod.", "")


def rename(name: str) -> str:
    """Of any spelling that of 007_mamba, or of 00x_steps for branches with gates."""
    plain = uncompiled(name).replace(".qkv_prep.", ".")
    return plain.replace(".mamba.mamba.", ".mamba.").replace(".mamba.norm_in.", ".norm_mamba.")


def spelling_of_celp18(config: BakaConfig, name: str) -> str:
    """The name in that branch, where attention's projections and the perceptron are compiled."""
    compiled = re.sub(r"\.attn\.([qkv])\.", r".attn.qkv_prep._orig_mod.\1.", name).replace(".mlp.", ".mlp._orig_mod.")
    return compiled.replace(".mamba.", ".mamba.mamba.").replace(".norm_mamba.", ".mamba.norm_in.")
