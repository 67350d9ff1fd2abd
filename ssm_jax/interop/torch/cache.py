"""What a model carries from one call to the next."""

import dataclasses
from typing import ClassVar

from torch import Tensor


@dataclasses.dataclass
class RecurrentCache:
    """The ``past_key_values`` of the models here; its size does not depend on how much has been read.

    A call does not change the cache that it is given: the result holds a new one, and the old one can be used again.

    layers: one recurrent state [B, ...] per layer, at least float32.
    tokens: [B], how many tokens each row has read; absent ones (padding) do not count.
    columns: how many columns the calls so far had, absent ones included.
    """

    is_compileable: ClassVar[bool] = False
    """For ``generate``: the step is not to be compiled on its own account."""

    layers: list[Tensor]
    tokens: Tensor
    columns: int

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """What ``generate`` asks for, to know which columns of a longer input are new."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Picks rows, in place: what ``generate`` does between two steps of a beam search."""
        self.layers = [state.index_select(0, beam_idx.to(state.device)) for state in self.layers]
        self.tokens = self.tokens.index_select(0, beam_idx.to(self.tokens.device))
