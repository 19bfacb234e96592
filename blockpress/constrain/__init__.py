"""Constraints: what an answer must be, enforced on whole canvases.

    expression -> automaton over bytes -> automaton over tokens -> posterior of a canvas

Invariant: nothing here knows the network, the engine or a request.
Run it:  python -m pytest tests/constrain
"""

from __future__ import annotations

from blockpress.constrain.constraint import CanvasConstraint, Constraint, ConstraintState

__all__ = ["CanvasConstraint", "Constraint", "ConstraintState"]
