"""The small residual network of the recorded runs, as an ordinary Linen model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ssm_jax.optim import relora

WRAPPED = ("mlp_up/kernel", "mlp_down/kernel", "attn_proj/kernel")


class Residual(nn.Module):
    """h = inp(x); h += mlp_down(tanh(mlp_up(norm(h)))); h += attn_proj(h); head(h)."""

    width: int = 12
    hidden: int = 20
    outputs: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kinds = {"param_dtype": x.dtype}
        h = nn.Dense(self.width, name="inp", **kinds)(x)
        normed = nn.LayerNorm(1e-5, use_fast_variance=False, name="norm", **kinds)(h)
        up = jnp.tanh(nn.Dense(self.hidden, name="mlp_up", **kinds)(normed))
        h = h + nn.Dense(self.width, use_bias=False, name="mlp_down", **kinds)(up)
        h = h + nn.Dense(self.width, use_bias=False, name="attn_proj", **kinds)(h)
        return nn.Dense(self.outputs, name="head", **kinds)(h)


MODEL = Residual()


def loss(wrapped: relora.Wrapped, trainable: dict, frozen: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    out = wrapped.apply({"params": relora.combine(trainable, frozen)}, x)
    return jnp.mean(jnp.square(out - y))


def our_name(theirs: str) -> str:
    """mlp.up.lora_A.weight -> mlp_up/kernel:a."""
    *module, leaf = theirs.removesuffix(".weight").split(".") if theirs.endswith("weight") else theirs.split(".")
    if leaf in ("lora_A", "lora_B"):
        return f"{'_'.join(module)}/kernel:{leaf[-1].lower()}"
    if leaf == "bias":
        return f"{'_'.join(module)}/bias"
    name = "_".join([*module, leaf])
    return f"{name}/scale" if name == "norm" else f"{name}/kernel"


def combined(values: dict[str, np.ndarray], prefix: str) -> dict:
    """The file's tensors under a prefix as our combined tree; torch's matrices are [out, in]."""
    leaves = {our_name(key.removeprefix(prefix)): x for key, x in values.items() if key.startswith(prefix)}
    return relora.trees.nested({path: jnp.asarray(x.T if x.ndim == 2 else x) for path, x in leaves.items()})
