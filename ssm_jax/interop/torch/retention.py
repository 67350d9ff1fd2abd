"""Retention (Sun et al. 2023, arXiv:2307.08621), exactly, in pieces of any size.

With the rate gamma of a head and S_n = 1 + gamma + ... + gamma^n, for the n-th token:

    R_n = gamma R_{n-1} + k_n v_n^T        o_n = q_n R_n / sqrt(S_n)

which is the originals' recurrent form. Over a piece after the tokens up to p:

    o_n = [ sum over p < m <= n of gamma^(n-m) (q_n . k_m) v_m + gamma^(n-p) q_n R_p ] / sqrt(S_n)

(They carry R_n / sqrt(S_n). Their chunkwise form starts S anew in every chunk, and is another function.) Their parallel form also
divides every row of scores by its size where that exceeds 1. The norm of each head undoes that, but for its eps, which shows where
scores are small.
"""

import dataclasses

import torch
from torch import Tensor

from ssm_jax.interop.torch.rel_pos import RelativePositions, rotate
from ssm_jax.interop.torch.steps import Steps

CEILING = 5e4
"""Of the size that "sum_abs" divides by."""


@dataclasses.dataclass(frozen=True)
class Retention:
    """The retention of one call, the same for every layer.

    cos, sin: [B or 1, 1, L, d_k], the rotation of queries and keys. log_decay: [H, 1], log(gamma). The computation and the state
        have their type, float32 or float64.
    chunk_size: tokens in a piece.
    score_normaliser: None, or the size of a row in the originals' parallel form, through which no gradient flows: "abs_sum", its
        sum without the sign, or "sum_abs", the sum of its absolute values, at most ``CEILING``. It needs the whole sequence.
    """

    steps: Steps
    cos: Tensor
    sin: Tensor
    log_decay: Tensor
    chunk_size: int
    score_normaliser: str | None

    @classmethod
    def of(
        cls, steps: Steps, rel_pos: RelativePositions, dtype: torch.dtype, chunk_size: int, score_normaliser: str | None
    ) -> "Retention":
        """For a model that computes in ``dtype``."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        cos, sin = (x.to(wide) for x in rel_pos.rotation(steps.number))
        log_decay = rel_pos.log_decay().to(cos.device, wide)[:, None]
        return cls(steps, cos, sin, log_decay, chunk_size, score_normaliser)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output [B, H, L, d_v] and the state R [B, H, d_k, d_v] after the last token.

        Args:
            q, k: [B, H, L, d_k], before the rotation; k times d_k^(-1/2). v: [B, H, L, d_v].
            state: R before the first token; None at the start.
        """
        q, k, v = (x.to(self.cos.dtype) for x in (q, k, v))
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        if self.score_normaliser:
            return self._normalised(q, k, v), self._after(self.steps, k, v, state)
        outputs, start = [], 0
        for steps in self.steps.split(self.chunk_size):
            columns = slice(start, start := start + steps.number.shape[1])
            outputs.append(self._piece(steps, q[:, :, columns], k[:, :, columns], v[:, :, columns], state))
            state = self._after(steps, k[:, :, columns], v[:, :, columns], state)
        assert state is not None
        return torch.cat(outputs, dim=2), state

    def _piece(self, steps: Steps, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
        o = (q @ k.mT * self._decays(steps)) @ v
        if state is not None:
            o = o + self._power(steps.read)[..., None] * (q @ state)
        return o / self._size(steps).sqrt()

    def _after(self, steps: Steps, k: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
        weights = self._power(steps.number[:, -1:] - steps.number)
        if steps.present is not None:
            weights = weights * steps.present[:, None]
        added = (k * weights[..., None]).mT @ v
        return added if state is None else self._power(steps.read[:, -1:])[..., None] * state + added

    def _normalised(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * self._decays(self.steps) / self._size(self.steps).sqrt()
        if self.score_normaliser == "abs_sum":
            sizes = scores.sum(-1, keepdim=True).abs().clamp(min=1)
        else:
            sizes = scores.abs().sum(-1, keepdim=True).clamp(1, CEILING)
        return (scores / sizes.detach()) @ v

    def _power(self, exponent: Tensor) -> Tensor:
        """gamma to the power [B or 1, L]: [B or 1, H, L]."""
        return torch.exp(self.log_decay * exponent[:, None])

    def _decays(self, steps: Steps) -> Tensor:
        """gamma^(n-m) for the tokens m up to n, 0 for all others: [B or 1, H, L, L]."""
        ages = steps.number[:, :, None] - steps.number[:, None]
        visible = torch.ones_like(ages, dtype=torch.bool).tril()
        if steps.present is not None:
            visible = visible & steps.present[:, None]
        # Before exp: the powers of what comes later overflow.
        return torch.exp(self.log_decay[..., None] * ages.clamp(min=0)[:, None]) * visible[:, None]

    def _size(self, steps: Steps) -> Tensor:
        """S_n [B or 1, H, L, 1]; 1 where there is no token yet."""
        terms = steps.number.clamp(min=0) + 1
        return (torch.expm1(self.log_decay * terms[:, None]) / torch.expm1(self.log_decay))[..., None]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, H d] -> [B, H, L, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, L, d] -> [B, L, H d]."""
    return x.transpose(1, 2).flatten(-2)
