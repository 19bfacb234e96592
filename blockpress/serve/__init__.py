"""A model behind HTTP: the APIs that people's clients speak.

Invariant: only this room knows FastAPI; a route translates, and everything else is done by the model and its engine.
Run it:  blockpress serve
"""

from __future__ import annotations

from blockpress.serve.app import create_app
from blockpress.serve.options import ServeOptions

__all__ = ["ServeOptions", "create_app"]
