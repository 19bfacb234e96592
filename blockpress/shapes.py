"""The shapes of tensors that pass between rooms, as jaxtyping aliases.

    batch     rows of one call                     context   cached tokens of a row
    length    tokens of a prompt                   canvas    tokens of the block being written
    vocab     tokens of the vocabulary             hidden    features of the network
    heads     query heads of a layer               kv_heads  its key/value heads, a divisor of the former
    queries   tokens that attend                   keys      tokens that they may attend to: context and own
    dim       features of one head

The aliases are documentation in production and are checked in the tests, where pytest runs with
`--jaxtyping-packages=blockpress,beartype.beartype`.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

Tokens = Int[Tensor, "batch length"]
Canvas = Int[Tensor, "batch canvas"]
Positions = Int[Tensor, "batch length"]
Hidden = Float[Tensor, "batch length hidden"]
Signal = Float[Tensor, "batch canvas hidden"]
Logits = Float32[Tensor, "batch length vocab"]
Entropy = Float32[Tensor, "batch canvas"]
Accepted = Bool[Tensor, "batch canvas"]
Heads = Float[Tensor, "batch heads queries dim"]
KeyHeads = Float[Tensor, "batch kv_heads keys dim"]
Mask = Bool[Tensor, "#batch queries keys"]
