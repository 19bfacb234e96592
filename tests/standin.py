"""A stand-in for a GPU: tensors that say they are on cuda:0, and hold their values in this processor's memory.

    network.to("cuda")          OnCard tensors; every call of torch passes `Card.__torch_function__`
    on the card and off it      in one call: the error that CUDA raises
    .item() .tolist() x[mask]   the processor waits for the device           Tally.waits
    torch.tensor(device=cuda)   staged: torch copies, and waits for the copy   Tally.staged
    pinned and non_blocking     queued, nobody waits                         Tally.sent

Whatever a device does with values is done by the processor's own operations, so results can be compared bit by bit; what
is a matter of the device (kernels, graphs, streams, the order of sums) or of a tensor's exact type is not shown here. A
copy back that is only queued holds noise until somebody waits, as on a device that is slower than its processor.

Invariant: after `standin()` everything is as it was, for other tests too.
Run it:  python -m pytest tests/test_standin.py tests/engine/test_waits.py
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import blockpress
from blockpress.ops import kernels, linear, packed, rows, unpacking
from blockpress.ops.cpu import bridge
from blockpress.ops.vocabulary import native

CUDA = torch.device("cuda", 0)
PACKAGE = Path(blockpress.__file__).parent
MEMORY = 1 << 33
"""Bytes that the card says are free."""

READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__format__", "__repr__"}
"""What gives the processor a value of a tensor."""
SIZES = {"nonzero", "argwhere", "unique", "_unique2", "masked_select", "bincount", "equal", "allclose", "is_nonzero"}
"""Calls whose result, or its size, the processor must know."""
DATA = {"tensor", "as_tensor", "new_tensor"}
"""What makes a tensor of the processor's own values."""
STRICT = {"cat", "stack", "index_copy", "index_copy_", "scatter", "scatter_", "gather", "index_select"}
"""What takes no scalar of another device either; arithmetic does."""


class OnCard(Tensor):
    """A tensor of the device. Its values lie here, but nobody is given their address."""

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def data_ptr(self) -> int:
        raise AssertionError("an address of the device, where code of the processor would read")

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")


class Tally:
    """What has gone between processor and device: each wait and each staged copy by the line that caused it."""

    def __init__(self) -> None:
        self.waits = Counter[str]()
        self.staged = Counter[str]()
        self.sent = 0

    @property
    def figures(self) -> tuple[int, int]:
        """How many waits, and how many staged copies."""
        return self.waits.total(), self.staged.total()

    def __repr__(self) -> str:
        return f"waits {dict(self.waits)}, staged {dict(self.staged)}, sent {self.sent}"


def line() -> str:
    """The line of the package that is running, and the first one outside `ops/transfer.py` that led there."""
    frame, found = sys._getframe(1), list[str]()
    while frame is not None and len(found) < 2:
        if name := inside(frame.f_code.co_filename):
            found.append(f"{name}:{frame.f_lineno}")
            if not name.endswith("transfer.py"):
                break
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found) or "a test"


@cache
def inside(file: str) -> str:
    """The path of a file in the package, empty for other files."""
    path = Path(file)
    return str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else ""


PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size})
"""What arguments are made of, but for tensors and containers: a call may have thousands of numbers."""


def tensors(given: Any) -> list[Tensor]:
    """All tensors among the arguments of a call."""
    found: list[Tensor] = []
    add_tensors((given,), found)
    return found


def add_tensors(given: Iterable[Any], found: list[Tensor]) -> None:
    for each in given:
        if type(each) in PLAIN:
            continue
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, list | tuple):
            add_tensors(each, found)
        elif isinstance(each, dict):
            add_tensors(each.values(), found)
        elif isinstance(each, slice):
            add_tensors((each.start, each.stop, each.step), found)


def there(device: Any) -> bool:
    """Whether a device that is asked for is the card."""
    return device is not None and torch.device(device).type == "cuda"


def decides_sizes(name: str, found: Sequence[Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether a call that otherwise waits for nobody has a result whose size follows from values."""
    if name == "where":
        return len(found) == 1 and "other" not in kwargs and "input" not in kwargs
    return name == "repeat_interleave" and len(found) > 1 and kwargs.get("output_size") is None


def carded(result: Any) -> Any:
    """A result with its tensors on the card."""
    if type(result) is Tensor:
        return result.as_subclass(OnCard)
    if type(result) in PLAIN or isinstance(result, Tensor):
        return result
    if type(result) in (tuple, list):
        return type(result)(map(carded, result))
    return tree_map(lambda x: x.as_subclass(OnCard) if type(x) is Tensor else x, result)


def noise(tensor: Tensor) -> None:
    """Values that nobody could take for results."""
    kind = tensor.dtype
    value = torch.nan if kind.is_floating_point else True if kind == torch.bool else torch.iinfo(kind).max
    tensor.fill_(value)


class Card(TorchFunctionMode):
    """Sees every call of torch while it is entered, and keeps tensors of the device apart from others."""

    def __init__(self) -> None:
        super().__init__()
        self._tally = Tally()
        self._pinned: dict[int, Tensor] = {}  # kept, so that no other tensor comes to lie at the address
        self._queued: list[tuple[Tensor, Tensor]] = []
        self._ways: dict[str, Callable[..., Any]] = {
            "to": self._to,
            "cuda": lambda func, x, *_, **given: self._to(Tensor.to, x, CUDA, **given),
            "cpu": lambda func, x: self._to(Tensor.to, x, "cpu"),
            "copy_": self._copy,
            "pin_memory": lambda func, x: self._pin(x.clone()),
            "is_pinned": lambda func, x: self._is_pinned(x),
            "__getitem__": self._index,
            "__setitem__": self._put,
            "__iter__": lambda func, x: iter(carded(x.unbind())),
            "_has_compatible_shallow_copy_type": lambda func, x, y: type(x) is type(y) and func(x, y),
        }

    def take(self) -> Tally:
        """What has been counted since the last call."""
        tally, self._tally = self._tally, Tally()
        return tally

    def wait(self) -> None:
        """The processor waits for all that is queued."""
        for target, value in self._queued:
            target.copy_(value)
        self._queued.clear()
        self._tally.waits[line()] += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name == "__get__":  # an attribute, of which the processor knows the value; or another view
            with torch._C.DisableTorchFunctionSubclass():
                return carded(func(*args)) if isinstance(args[0], OnCard) else func(*args)
        kwargs, found = dict(kwargs or {}), list[Tensor]()
        add_tensors(args, found)
        if kwargs:
            add_tensors(kwargs.values(), found)
        asked = kwargs.get("device")
        ours = there(asked) or name in ("to", "cuda", "pin_memory", "is_pinned")
        if not ours and not any(isinstance(x, OnCard) for x in found):
            return self._off(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if name in self._ways:
                return self._ways[name](func, *args, **kwargs)
            return self._run(func, name, found, args, kwargs)

    def _off(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A call that is the processor's own matter."""
        pin = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        return self._pin(result) if pin else result

    def _run(self, func: Any, name: str, found: Sequence[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        asked, on = kwargs.pop("device", None), [x for x in found if isinstance(x, OnCard)]
        if asked is not None:
            kwargs["device"] = "cpu"
        self._check(name, found, on, kwargs.get("generator") if there(asked) or on else None)
        if name in READS | SIZES or decides_sizes(name, found, kwargs):
            self.wait()
        result = func(*args, **kwargs)
        if name in DATA:
            if any(x is not args[0] for x in on):  # a list of the device's own scalars, read one by one
                self.wait()
            elif not on:
                self._tally.staged[line()] += 1
        return result if asked is not None and not there(asked) else carded(result)

    def _check(self, name: str, found: Sequence[Tensor], on: Sequence[Tensor], generator: Any) -> None:
        """A call takes tensors of one device; a scalar of the processor may stand among them in arithmetic."""
        off = [x for x in found if not isinstance(x, OnCard) and (x.ndim or name in STRICT)]
        if on and off:
            shapes = [tuple(x.shape) for x in off]
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} has cuda:0, and on cpu {shapes}")
        if generator is not None and generator.device.type != "cuda":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")

    def _to(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = ("device", "dtype", "non_blocking", "copy")
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        names = names[1:] if args and isinstance(args[0], torch.dtype) else names
        given = {name: value for name, value in (*zip(names, args, strict=False), *kwargs.items()) if value is not None}
        asked, queued = given.pop("device", None), bool(given.pop("non_blocking", False))
        lies = isinstance(x, OnCard)
        goes = lies if asked is None else there(asked)
        value = func(x, **given) if given else x
        if goes == lies:
            return carded(value) if lies else value
        fresh = (value.clone() if value is x else value).as_subclass(Tensor)
        if goes:
            self._send(x, queued)
            return fresh.as_subclass(OnCard)
        if queued:
            self._queue(fresh, fresh.clone())
        else:
            self.wait()
        return fresh

    def _copy(self, func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        goes, lies = isinstance(target, OnCard), isinstance(source, OnCard)
        if lies and not goes:
            if non_blocking and self._is_pinned(target):
                self._queue(target, source.clone())
                return target
            self.wait()
        elif goes and not lies:
            self._send(source, non_blocking)
        return func(target, source)

    def _index(self, func: Any, x: Tensor, at: Any) -> Any:
        self._look(x, at, filled=False)
        return carded(func(x, at))

    def _put(self, func: Any, x: Tensor, at: Any, value: Any) -> None:
        self._look(x, at, filled=not isinstance(value, Tensor) or value.numel() == 1)
        if isinstance(value, Tensor) and value.ndim:
            if isinstance(x, OnCard) and not isinstance(value, OnCard):
                assert not any(each.ndim for each in tensors(at)), "places by tensors take values of their own device"
                self._send(value, queued=False)
            elif isinstance(value, OnCard) and not isinstance(x, OnCard):
                self.wait()
        func(x, at, value)

    def _look(self, x: Tensor, at: Any, filled: bool) -> None:
        """Count what an index costs: a mask's places are waited for, but where one value fills them all."""
        if not isinstance(x, OnCard) and any(isinstance(each, OnCard) for each in tensors(at)):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        for part in at if isinstance(at, tuple) else (at,):
            for each in tensors(part):
                if isinstance(each, OnCard):
                    scalar = not each.ndim or isinstance(part, slice)
                    if scalar or (each.dtype == torch.bool and not filled):
                        self.wait()
                elif each.ndim:
                    self._send(each, queued=False)
            if isinstance(part, list) and isinstance(x, OnCard):
                self._tally.staged[line()] += 1

    def _send(self, source: Tensor, queued: bool) -> None:
        if queued and self._is_pinned(source):
            self._tally.sent += 1
        else:
            self._tally.staged[line()] += 1

    def _queue(self, target: Tensor, value: Tensor) -> None:
        """A copy back, which is there once somebody has waited."""
        noise(target)
        self._queued.append((target, value.as_subclass(Tensor)))

    def _pin(self, x: Tensor) -> Tensor:
        self._pinned[x.untyped_storage().data_ptr()] = x
        return x

    def _is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self._pinned


class Event:
    """An event of a stream, of which there is one: whoever waits for it waits for all that is queued."""

    card: Card

    def __init__(self, *given: Any, **more: Any) -> None:
        self.recorded = 0

    def record(self, *stream: Any) -> None:
        """What has been queued by now is what `synchronize` waits for."""
        self.recorded = len(self.card._queued)

    def synchronize(self) -> None:
        """Wait; what was queued after `record` is still on its way."""
        later = self.card._queued[self.recorded :]
        del self.card._queued[self.recorded :]
        self.card.wait()
        self.card._queued += later


@contextmanager
def standin() -> Iterator[Card]:
    """A machine with one GPU, without Triton, for as long as this is entered."""
    card = Card()
    calls: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: "a stand-in",
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "is_current_stream_capturing": lambda: False,
        "device": lambda device: nullcontext(),
        "synchronize": lambda device=None: card.wait(),
        "Event": type("Event", (Event,), {"card": card}),
    }
    with ExitStack() as stack:
        for name, call in calls.items():
            stack.enter_context(patch.object(torch.cuda, name, call))
        stack.enter_context(patch.object(kernels, "available", lambda: False))
        for table in ("_pairs", "scale_table", "_products"):  # tables of the card are not kept for a real one
            stack.enter_context(patch.object(packed, table, cache(getattr(packed, table).__wrapped__)))
        future = torch.__future__  # a parameter of the card is another object
        stack.callback(
            future.set_overwrite_module_params_on_conversion, future.get_overwrite_module_params_on_conversion()
        )
        future.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(card)
        yield card


@contextmanager
def plain_torch() -> Iterator[None]:
    """Processors compute in here as the card does: by torch alone, so that values are the same to the last bit."""
    with ExitStack() as stack:
        for module in (native, rows, unpacking):
            stack.enter_context(patch.object(module, "_library", lambda: None))
        for name, answer in (("library", None), ("_worth", False)):
            stack.enter_context(patch.object(bridge, name, lambda answer=answer: answer))
        stack.enter_context(patch.object(linear, "float32_way", lambda: "mkl"))
        yield
