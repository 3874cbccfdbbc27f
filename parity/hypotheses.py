"""What may be wrong with a port, as things that can be tried."""

from __future__ import annotations

CAUSES = (
    "transpose",
    "axis flip",
    "axis order",
    "head split order",
    "q/k/v permutation",
    "shift",
    "eps",
    "half-pixel",
    "align_corners",
    "gelu",
    "bias",
    "scale",
    "BGR",
    "padding side",
    "padding",
    "mask polarity",
    "mask missing",
    "normaliser",
    "momentum",
    "class order",
    "layer order",
    "dtype rounding",
    "clip",
    "weight decay",
    "learning rate",
    "threshold",
    "id",
    "stale weight",
    "missing term",
    "not finite",
)
"""What a cause may be called. "missing term": something is left out, added twice or cut off (a residual connection, a position embedding, a
gradient's path); "layer order": something is taken or done before or behind the place where it belongs."""
