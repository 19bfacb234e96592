"""Every error that blockpress raises for its caller, in one tree.

    BlockpressError
    ├── ConfigError              a config field that is wrong, missing, or changes the maths in a way we do not know
    ├── CheckpointError          files on disk
    │   ├── ModelNotFound        no shipped model, directory or checkpoint of that name
    │   ├── HubError             what the hub, the network or the disk refuses while a model is fetched
    │   ├── DamagedFile          cut short, not what its name says, unreadable
    │   ├── MissingWeights       a tensor or a shard that the config asks for is not there
    │   ├── UnexpectedWeights    a tensor that nothing in the model takes
    │   └── ShapeMismatch        a tensor of another shape than the config asks for
    ├── TextError                text, token ids or a template that the tokenizer cannot take
    ├── RequestError             an argument of a call
    │   ├── MediaError           an image or video that cannot be read, or does not fit its prompt
    │   ├── PromptTooLong        the prompt leaves no room in the context
    │   └── Overloaded           the engine's queue is full; the same request may be sent again later
    ├── EngineError              a valid request that the engine could not finish
    ├── PuzzleError              a sudoku that is malformed or contradicts itself
    └── TrainingError            a recipe, a resume point or a run that went wrong

Invariant: an error names what is wrong (with its value) and, in `hint`, says what to do about it.
`assert` is for our own mistakes, which are not part of this tree.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter, signature
from typing import Any, TypeVar

__all__ = [
    "BlockpressError",
    "CheckpointError",
    "ConfigError",
    "DamagedFile",
    "EngineError",
    "HubError",
    "MediaError",
    "MissingWeights",
    "ModelNotFound",
    "Overloaded",
    "PromptTooLong",
    "PuzzleError",
    "RequestError",
    "ShapeMismatch",
    "TextError",
    "TrainingError",
    "UnexpectedWeights",
]

Kind = TypeVar("Kind")


class BlockpressError(Exception):
    """The root: `message` says what is wrong, with its value, and `hint` what to do.

    `str(error)` is both on one line, which the commands print before they exit with code 2.
    """

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = " ".join(message.split())
        self.hint = " ".join(hint.split())

    def __reduce__(self) -> tuple[object, ...]:
        # A worker process returns its error by pickle, which passes positional arguments only.
        return _rebuilt, (type(self), self.message, self.hint)

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})"


def _rebuilt(kind: type[BlockpressError], message: str, hint: str) -> BlockpressError:
    return kind(message, hint=hint)


class ConfigError(BlockpressError):
    """A field of a configuration is missing, of the wrong type, out of range, or not understood."""


class CheckpointError(BlockpressError):
    """A checkpoint directory or one of its files cannot be used."""


class ModelNotFound(CheckpointError):
    """No shipped model, directory or checkpoint goes by that name."""


class HubError(CheckpointError):
    """A model cannot be fetched: the hub or the network refuses, the disk is full, or a file arrives damaged."""


class DamagedFile(CheckpointError):
    """A file is cut short, unreadable, or not of the format that its name promises."""


class MissingWeights(CheckpointError):
    """The config asks for a tensor or a shard that the checkpoint does not hold."""


class UnexpectedWeights(CheckpointError):
    """The checkpoint holds a tensor that nothing in the model takes."""


class ShapeMismatch(CheckpointError):
    """A tensor's shape or type is not the one that the config asks for."""


class TextError(BlockpressError):
    """Text, token ids or a chat template that the tokenizer cannot take."""


class RequestError(BlockpressError):
    """An argument of a call is wrong; the message names the argument and its value."""


class MediaError(RequestError):
    """An image or a video that cannot be read, is too large or too long, or has no place in its prompt."""


class PromptTooLong(RequestError):
    """The prompt leaves no room for a canvas in the model's context."""


class Overloaded(RequestError):
    """The engine's queue is full; nothing is wrong with the request, which may be sent again later."""


class EngineError(BlockpressError):
    """A forward failed, or gave NaN or infinity: the request ends, all others go on."""


class PuzzleError(BlockpressError):
    """A sudoku that is malformed or contradicts itself."""


class TrainingError(BlockpressError):
    """A recipe, a resume point or a training run that cannot go on."""


def one_line(error: BaseException) -> str:
    """The kind of an exception and what it says, on one line; of one that cannot say anything, its kind."""
    kind = type(error).__name__
    try:
        return " ".join(f"{kind}: {error}".split())
    except BaseException:  # a caller's exception may raise whatever it likes from its __str__
        return f"{kind}, which cannot be shown as text"


def renamed(module: str, older: Mapping[str, Any], exported: list[str]) -> Callable[[str], Any]:
    """A module's `__getattr__` for its former names: each still works, with a DeprecationWarning.

    Args:
        older: the class or function that each former name stands for; such names last for two minor versions.
    """

    def getattribute(name: str) -> Any:
        if name not in older:
            raise AttributeError(f"module {module!r} has no attribute {name!r}; it has {', '.join(exported)}")
        warnings.warn(f"{module}.{name} is now {module}.{older[name].__name__}", DeprecationWarning, stacklevel=2)
        return older[name]

    return getattribute


def renamed_attribute(old: str, new: str) -> Any:
    """What a class has in the place of a field or method that has another name now: it works, with a warning."""

    def read(instance: Any) -> Any:
        name = type(instance).__name__
        warnings.warn(f"{name}.{old} is now {name}.{new}", DeprecationWarning, stacklevel=2)
        return getattr(instance, new)

    return property(read)


def newer_names(kind: str, older: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by today's names; an `older` one among them is taken, with a warning to the caller's caller."""
    for old in older.keys() & given.keys():
        warnings.warn(f"{kind}.{old} is now {kind}.{older[old]}", DeprecationWarning, stacklevel=3)
    newer = {name: value for name, value in given.items() if name not in older}
    return newer | {new: given[old] for old, new in older.items() if old in given}


def renamed_fields(**older: str) -> Callable[[type[Kind]], type[Kind]]:
    """Decorates a dataclass some of whose fields have other names now: the older ones can still be given and read.

    Args:
        older: today's name of each former one. Where both are given, as by `dataclasses.replace`, the former counts.
    """

    def alias(kind: type[Kind]) -> type[Kind]:
        make = kind.__init__

        @wraps(make)
        def init(self: Kind, *args: Any, **given: Any) -> None:
            make(self, *args, **(newer_names(kind.__name__, older, given) if older.keys() & given.keys() else given))

        # So that who checks calls by the signature lets the older names through; wraps has given it that of `make`.
        fields = signature(make)
        rest = Parameter("older", Parameter.VAR_KEYWORD)
        init.__signature__ = fields.replace(parameters=[*fields.parameters.values(), rest])  # type: ignore[attr-defined]
        kind.__init__ = init  # type: ignore[assignment, method-assign]
        for old, new in older.items():
            setattr(kind, old, renamed_attribute(old, new))
        return kind

    return alias
