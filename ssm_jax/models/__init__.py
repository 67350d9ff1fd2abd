"""Language models: ``build``, the families and the published sizes."""

from ssm_jax.models.baka import BakaConfig
from ssm_jax.models.build import build, count_parameters, flops_per_token, to_nnx
from ssm_jax.models.dense_mamba import DenseMambaConfig
from ssm_jax.models.dense_retnet import DenseRetNetConfig
from ssm_jax.models.gpt2 import GPT2Config
from ssm_jax.models.gpt_neox import GPTNeoXConfig
from ssm_jax.models.gss import GSSConfig
from ssm_jax.models.llama import LlamaConfig
from ssm_jax.models.lm import LanguageModel
from ssm_jax.models.mamba import MambaConfig
from ssm_jax.models.mamba2 import Mamba2Config
from ssm_jax.models.registry import FAMILIES, PRESETS, config_from_dict, config_to_dict
from ssm_jax.models.retnet import RetNetConfig

__all__ = [
    "FAMILIES",
    "PRESETS",
    "BakaConfig",
    "DenseMambaConfig",
    "DenseRetNetConfig",
    "GPT2Config",
    "GPTNeoXConfig",
    "GSSConfig",
    "LanguageModel",
    "LlamaConfig",
    "Mamba2Config",
    "MambaConfig",
    "RetNetConfig",
    "build",
    "config_from_dict",
    "config_to_dict",
    "count_parameters",
    "flops_per_token",
    "to_nnx",
]
