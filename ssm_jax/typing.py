"""The dimension legend and the array aliases that signatures share.

Suffixes name the axes of an array, outermost first: ``x_BLD`` has shape (batch, length, model width).

==  =======================================================================
B   batch lane
L   length, in tokens
D   model width
E   inner width of a mixer (``expand * D``)
N   state size per channel (Mamba), key width (SSD, retention)
K   taps of the short convolution
R   rank of the step-size projection (Mamba-1)
H   head
P   head width, value width per head
G   group of heads that share B and C (Mamba-2), or keys and values (attention)
S   key of an attention product: those before the call and those of its L tokens
V   vocabulary row, padding rows included
==  =======================================================================
"""

from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

Tokens = Int[Array, "B L"]
Positions = Int[Array, "B L"]
Reset = Bool[Array, "B L"]
Lengths = Int[Array, "B"]
Activations = Float[Array, "B L D"]

PyTree = Any
Params = dict[str, Any]
"""A plain nested dict of bare arrays."""
Variables = dict[str, Params]
"""``{"params": Params}``, what ``model.init`` returns and ``model.apply`` takes."""
Key = jax.Array
