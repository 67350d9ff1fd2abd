"""What stands in the slots of one chunk of Baka: [memory read | pauses and tokens | memory written].

Every row has the same slots: where its first chunk has no memory to read, those slots are there and absent, which moves a row's
other slots by a constant that no difference of places shows. Pause i stands at place i * stride of the middle part.
"""

import dataclasses

import torch
from torch import Tensor

from ssm_jax.interop.torch.configs import BakaConfig


@dataclasses.dataclass(frozen=True)
class ChunkSlots:
    """The slots t = 0 .. T - 1 of a chunk in each row.

    first: [B, 1], whether it is the row's first chunk. closed: [B, 1], whether it ends here. length: [B, 1], slots until its end.
    read, pause, token, write, present: [B, T], what stands where; the last is any of them.
    nth_token: [B, T], the number of a slot's token in the chunk, or any number from 0 to N - 1.
    slot_of: [B, N], where the chunk's n-th token stands.
    """

    first: Tensor
    closed: Tensor
    length: Tensor
    read: Tensor
    pause: Tensor
    token: Tensor
    write: Tensor
    nth_token: Tensor
    slot_of: Tensor

    @classmethod
    def of(cls, config: BakaConfig, tokens: Tensor, first: Tensor, most: int) -> "ChunkSlots":
        """``tokens``: [B, 1], how many the chunk has, N = ``most`` or fewer."""
        R, P, stride = config.n_rmt_tokens, config.n_pauses, config.stride
        by_call = config.chunk_boundary == "call"
        pauses = (tokens // stride + 1).clamp(max=P) if by_call else torch.full_like(tokens, P)
        middle = (tokens if by_call else torch.full_like(tokens, config.n_ctx)) + pauses
        place = torch.arange(2 * R + most + P, device=tokens.device)[None] - R
        inside = (place >= 0) & (place < middle)
        pause = inside & (place % stride == 0) & (place // stride < pauses)
        nth_token = place - torch.minimum((place + stride - 1) // stride, pauses)
        n = torch.arange(most, device=tokens.device)[None]
        before = torch.minimum(n // (stride - 1) + 1, pauses) if stride > 1 else pauses
        return cls(
            first=first,
            closed=tokens > 0 if by_call else tokens == config.n_ctx,
            length=middle + 2 * R,
            read=(place < 0) & ~first,
            pause=pause,
            token=inside & ~pause & (nth_token < tokens),
            write=(place >= middle) & (place < middle + R),
            nth_token=nth_token.clamp(0, most - 1),
            slot_of=R + n + before,
        )

    @property
    def present(self) -> Tensor:
        """[B, T]."""
        return self.read | self.pause | self.token | self.write


def pick(x: Tensor, columns: Tensor) -> Tensor:
    """x [B, T, D] at the columns [B, N] of each row."""
    return x.gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))
