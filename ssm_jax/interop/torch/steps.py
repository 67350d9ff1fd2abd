"""Which columns of a call hold a token, and the number of each token in its row."""

import dataclasses

import torch
from torch import Tensor

from ssm_jax.interop.torch.cache import RecurrentCache


@dataclasses.dataclass(frozen=True)
class Steps:
    """Absent columns (padding) are no steps: a recurrence passes them unchanged, and a row starts at its first token.

    number: [B or 1, L], 0 for a row's first token; an absent column has that of the last token before it, -1 where there is none.
    before: [B or 1, 1], tokens that earlier calls have read.
    present: [B, L] of booleans, or None where every column holds a token.
    """

    number: Tensor
    before: Tensor
    present: Tensor | None

    @classmethod
    def of(cls, tokens: Tensor, attention_mask: Tensor | None, cache: RecurrentCache | None) -> "Steps":
        """The steps of ``tokens`` [B, L].

        Args:
            attention_mask: [B, at least L], 1 where there is a token; columns of earlier calls may stand before.

        Raises:
            ValueError: the mask or the cache does not fit the tokens.
        """
        rows, length = tokens.shape
        if not length:
            raise ValueError("input_ids has no columns.")
        if cache is not None and len(cache.tokens) != rows:
            raise ValueError(f"The cache has {len(cache.tokens)} rows, input_ids {rows}.")
        before = tokens.new_zeros(1, 1) if cache is None else cache.tokens[:, None].to(tokens.device)
        present = _present(attention_mask, rows, length)
        if present is None:
            return cls(before + torch.arange(length, device=tokens.device), before, None)
        return cls(before + present.long().cumsum(1) - 1, before, present)

    @property
    def read(self) -> Tensor:
        """[B or 1, L]: tokens of this call up to each column, itself included."""
        return self.number + 1 - self.before

    def require_unbroken(self) -> None:
        """Raises ValueError where padding stands between two tokens of a row."""
        if self.present is not None and self.present.shape[1] > 1:
            starts = self.present[:, 0].long() + (self.present[:, 1:] & ~self.present[:, :-1]).sum(1)
            if bool((starts > 1).any()):
                raise ValueError(
                    "attention_mask has zeros between ones; this model takes padding only left or right of a row."
                )

    def split(self, size: int) -> list["Steps"]:
        """Consecutive parts of at most ``size`` columns."""
        parts, before = [], self.before
        for start in range(0, self.number.shape[1], size):
            columns = slice(start, start + size)
            parts.append(
                Steps(self.number[:, columns], before, None if self.present is None else self.present[:, columns])
            )
            before = parts[-1].number[:, -1:] + 1
        return parts


def _present(attention_mask: Tensor | None, rows: int, length: int) -> Tensor | None:
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < length:
        raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}; input_ids have {[rows, length]}.")
    present = attention_mask[:, -length:].bool()
    # A mask of ones, which generate makes, need not cost every row its own decays. (One column is cheap; asking a GPU is not.)
    return None if length > 1 and bool(present.all()) else present
