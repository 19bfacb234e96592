"""The canvas: noise, schedule, acceptance, settling and the loop. It knows no model."""

from blockpress.diffusion.accept import EntropyBound
from blockpress.diffusion.denoise import Denoiser, Draws, Reading, Step, denoise
from blockpress.diffusion.edits import Edits
from blockpress.diffusion.noise import KeyedDraws
from blockpress.diffusion.schedule import Schedule
from blockpress.diffusion.settle import StableAndConfident

__all__ = [
    "Denoiser",
    "Draws",
    "Edits",
    "EntropyBound",
    "KeyedDraws",
    "Reading",
    "Schedule",
    "StableAndConfident",
    "Step",
    "denoise",
]
