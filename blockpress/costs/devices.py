"""Rates of devices, bytes and operations per second, as programs reach them, not as data sheets print them.

    name        bytes/s     bfloat16      fp8          memory
    H100        3.00 T       790 T        1580 T        80 GB
    H200        4.30 T       790 T        1580 T       141 GB
    RTX 5090    1.61 T       168 T         335 T        32 GB      80 % of the data sheet's 209.5 and 419

Invariant: an unknown rate is refused by name, never guessed.

Run it:  python -m pytest blockpress/costs/devices.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from blockpress.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Device:
    """Memory in bytes, bandwidth in bytes per second, and operations per second by the type of the products."""

    name: str
    bandwidth: float
    rates: Mapping[str, float]
    memory: int

    def rate(self, math: str) -> float:
        """Operations per second in that type.

        Raises:
            RequestError: no rate is known.

        >>> DEVICES["h200"].rate("fp8") / DEVICES["rtx5090"].rate("fp8") > 4
        True
        """
        if math not in self.rates:
            known = ", ".join(sorted(self.rates))
            raise RequestError(f"no rate of {math} is known of {self.name}", hint=f"known are {known}")
        return self.rates[math]


_HOPPER = {"bfloat16": 790e12, "fp8": 1580e12}

DEVICES: Mapping[str, Device] = {
    "h100": Device(name="H100", bandwidth=3.0e12, rates=_HOPPER, memory=80 * 10**9),
    "h200": Device(name="H200", bandwidth=4.3e12, rates=_HOPPER, memory=141 * 10**9),
    "rtx5090": Device(name="RTX 5090", bandwidth=1.61e12, rates={"bfloat16": 168e12, "fp8": 335e12}, memory=32 * 10**9),
}
