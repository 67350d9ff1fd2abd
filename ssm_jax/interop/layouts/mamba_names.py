"""Published tensors of Mamba and Mamba-2, the same in every layout but for the name of the token table."""

from collections.abc import Collection

from ssm_jax.interop.tensor_map import Part, TensorMap, depthwise, linear, same, vector

HEAD = "lm_head.weight"
_LAYER = "backbone.layers.{i}."
_MIXER = _LAYER + "mixer."


def mamba_tensors(embedding: str) -> TensorMap:
    """x_proj holds rows [dt | B | C]."""
    return _with_shell(
        embedding,
        {
            "in_proj.weight": (linear("layers/mixer/in_proj/kernel"),),
            "in_proj.bias": (vector("layers/mixer/in_proj/bias"),),
            "conv1d.weight": (depthwise("layers/mixer/conv/kernel"),),
            "conv1d.bias": (vector("layers/mixer/conv/bias"),),
            "x_proj.weight": tuple(linear(f"layers/mixer/{name}/kernel") for name in ("dt_down", "B_proj", "C_proj")),
            "dt_proj.weight": (linear("layers/mixer/dt_up/kernel"),),
            "dt_proj.bias": (vector("layers/mixer/dt_bias"),),
            "A_log": (same("layers/mixer/A_log"),),
            "D": (vector("layers/mixer/D"),),
        },
    )


def mamba2_tensors(embedding: str) -> TensorMap:
    """in_proj holds rows [z | x | B | C | dt]; conv1d runs over channels [x | B | C]."""
    projections = ("in_proj", "B_proj", "C_proj", "dt_proj")
    convolutions = ("conv_x", "conv_B", "conv_C")
    return _with_shell(
        embedding,
        {
            "in_proj.weight": tuple(linear(f"layers/mixer/{name}/kernel") for name in projections),
            "in_proj.bias": tuple(vector(f"layers/mixer/{name}/bias") for name in projections),
            "conv1d.weight": tuple(depthwise(f"layers/mixer/{name}/kernel") for name in convolutions),
            "conv1d.bias": tuple(vector(f"layers/mixer/{name}/bias") for name in convolutions),
            "dt_bias": (vector("layers/mixer/dt_bias"),),
            "A_log": (vector("layers/mixer/A_log"),),
            "D": (vector("layers/mixer/D"),),
            "norm.weight": (vector("layers/mixer/norm/scale"),),
        },
    )


def has_mamba_names(names: Collection[str]) -> bool:
    """Whether tensor names are those of a Mamba-1 model."""
    return any(name.endswith("layers.0.mixer.x_proj.weight") for name in names)


def has_mamba2_names(names: Collection[str]) -> bool:
    """Whether tensor names are those of a Mamba-2 model."""
    return any(name.endswith("layers.0.mixer.dt_bias") for name in names)


def _with_shell(embedding: str, mixer: dict[str, tuple[Part, ...]]) -> TensorMap:
    return {
        embedding: (same("embed/embedding"),),
        _LAYER + "norm.weight": (vector("layers/norm/scale"),),
        **{_MIXER + name: parts for name, parts in mixer.items()},
        _MIXER + "out_proj.weight": (linear("layers/mixer/out_proj/kernel"),),
        _MIXER + "out_proj.bias": (vector("layers/mixer/out_proj/bias"),),
        "backbone.norm_f.weight": (vector("norm_f/scale"),),
        HEAD: (linear("head/kernel"),),
    }
