"""Gated state spaces (Mehta et al. 2022, arXiv:2206.13947) by the parameter names of gated-state-spaces-pytorch.

    x <- x + ((DSS(v) W_g) * u) W_o + b,  u = gelu(LayerNorm(x) W_u),  v = gelu(LayerNorm(x) W_v)

The package has no norm after the last layer; the published checkpoint has one, as the first member of ``to_logits``.
"""

import torch
from torch import Tensor, nn
from transformers import initialization

from ssm_jax.interop.torch.configs import GatedStateSpacesConfig
from ssm_jax.interop.torch.dss import DSS
from ssm_jax.interop.torch.lm import Decoded, RecurrentLM, States, torch_linear
from ssm_jax.interop.torch.steps import Steps


class GatedStateSpacesLayer(nn.Module):
    """A layer; see the file."""

    def __init__(self, config: GatedStateSpacesConfig) -> None:
        super().__init__()
        D, H = config.dim, config.dss_kernel_H
        width = int(config.dim_expansion_factor * D)
        self.norm = nn.LayerNorm(D)
        self.to_u = nn.Sequential(nn.Linear(D, width, bias=False), nn.GELU())
        self.to_v = nn.Sequential(nn.Linear(D, H, bias=False), nn.GELU())
        self.dss = DSS(
            H, config.dss_kernel_N, config.dss_kernel_lambda_imag_exp, config.accurate, config.recurrent_chunk_size
        )
        self.to_gate = nn.Linear(H, width, bias=False)
        self.to_out = nn.Linear(width, D)

    def forward(self, x: Tensor, steps: Steps, state: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        y, state = self.dss(self.to_v(h), steps, state)
        return x + self.to_out(self.to_gate(y.to(x.dtype)) * self.to_u(h)), state


class GatedStateSpacesForCausalLM(RecurrentLM):
    """The language model. A row's tokens must follow one another: padding to their left and right, not between them."""

    config_class = GatedStateSpacesConfig

    def __init__(self, config: GatedStateSpacesConfig) -> None:
        super().__init__(config)
        self.token_emb = nn.Embedding(config.num_tokens, config.dim)
        self.layers = nn.ModuleList(GatedStateSpacesLayer(config) for _ in range(config.depth))
        head = nn.Linear(config.dim, config.num_tokens, bias=False)
        self.to_logits = nn.Sequential(nn.LayerNorm(config.dim), head) if config.final_norm else head
        name = "to_logits.1.weight" if config.final_norm else "to_logits.weight"
        self._tied_weights_keys = {name: "token_emb.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.token_emb

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.token_emb = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.to_logits[1] if self.config.final_norm else self.to_logits

    def set_output_embeddings(self, value: nn.Linear) -> None:
        if self.config.final_norm:
            self.to_logits[1] = value
        else:
            self.to_logits = value

    def decode(self, tokens: Tensor, steps: Steps, states: States, keep: bool) -> Decoded:
        steps.require_unbroken()
        x = self.token_emb(tokens)
        residuals: list[Tensor] = []
        after: list[Tensor] = []
        for layer, state in zip(self.layers, states, strict=True):
            residuals += [x] if keep else []
            x, state = layer(x, steps, state)
            after.append(state)
        return Decoded(x, residuals, after)

    def readout(self, features: Tensor) -> Tensor:
        return self.to_logits(features)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the package: PyTorch's own, and normal numbers for modes and token table."""
        if isinstance(module, nn.Embedding):
            initialization.normal_(module.weight)
        elif isinstance(module, nn.Linear):
            torch_linear(module)
        elif isinstance(module, DSS):
            module.init_weights()
        else:
            super()._init_weights(module)
