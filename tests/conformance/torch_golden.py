"""Recorded outputs of the original RetNets, as PyTorch tensors."""

import json
from typing import Any

import numpy as np

from ssm_jax.interop.safetensors_file import read_safetensors
from tests.conformance.compare import assert_close
from tests.conformance.golden import GOLDENS

GRADIENTS = 1e-4
"""Of the largest entry of each."""


def read_golden(folder: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Weights, inputs and outputs, and the description of a folder below tests/goldens."""
    import torch

    weights, io = (
        {name: torch.from_numpy(np.array(x.load())) for name, x in read_safetensors(GOLDENS / folder / file).items()}
        for file in ("weights.safetensors", "io.safetensors")
    )
    return weights, io, json.loads((GOLDENS / folder / "config.json").read_text())


def assert_gradients(model: Any, io: dict[str, Any]) -> None:
    """Those that were recorded, as ``grad.NAME``."""
    gradients = {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
    recorded = {name: value for name, value in io.items() if name.startswith("grad.")}
    assert len(recorded) >= 10
    for name, value in recorded.items():
        assert_close(gradients[name], value, GRADIENTS * float(value.abs().max()))


def published_state(positions: Any, state: np.ndarray, tokens: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """From our R [H, d_k, d_v] of one row what the originals keep: (R / sqrt(S))^T and S.

    ``shift``: how much larger their positions are; ours count a row's own tokens from 0.
    """
    decays = positions.log_decay().numpy()
    S = np.expm1(tokens * decays) / np.expm1(decays)
    phases = shift * positions.angles().repeat_interleave(2).numpy()[:, None]
    turned = np.stack([-state[:, 1::2], state[:, 0::2]], axis=2).reshape(state.shape)
    moved = state * np.cos(phases) + turned * np.sin(phases)
    return np.swapaxes(moved / np.sqrt(S)[:, None, None], -1, -2), S
