"""The canvas: noise, schedule, acceptance, settling and the loop. It knows nothing of models."""

from blockpress.diffusion.accept import Accept, EntropyBound
from blockpress.diffusion.denoise import Denoiser, Draws, Step, denoise
from blockpress.diffusion.noise import KeyedDraws
from blockpress.diffusion.output import DenoiserOutput
from blockpress.diffusion.pins import Pins, given_tokens
from blockpress.diffusion.schedule import Schedule
from blockpress.diffusion.settle import Settle, StableAndConfident
from blockpress.diffusion.token_mask import TokenMask
from blockpress.diffusion.update import Update, step_rules, update

__all__ = [
    "Accept",
    "Denoiser",
    "DenoiserOutput",
    "Draws",
    "EntropyBound",
    "KeyedDraws",
    "Pins",
    "Schedule",
    "Settle",
    "StableAndConfident",
    "Step",
    "TokenMask",
    "Update",
    "denoise",
    "given_tokens",
    "step_rules",
    "update",
]
