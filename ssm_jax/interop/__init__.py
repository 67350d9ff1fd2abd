"""Weights of other programs: read from their folders, and written as folders that they load."""

from ssm_jax.interop.converting import convert
from ssm_jax.interop.fingerprint import fingerprint
from ssm_jax.interop.layouts import LAYOUTS, Layout
from ssm_jax.interop.pretrained import from_pretrained, model_of, save_pretrained
from ssm_jax.interop.torch.register import register

register()

__all__ = ["LAYOUTS", "Layout", "convert", "fingerprint", "from_pretrained", "model_of", "save_pretrained"]
