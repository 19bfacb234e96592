"""Loads damaged GGUF files, in a process that may take 512 MiB more than it had before, and prints what became of each.

Run it:  python -m tests.builders.gguf_breaker FILE COUNT SEED
"""

from __future__ import annotations

import json
import random
import resource
import signal
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from blockpress.checkpoints.gguf.header import read_header
from blockpress.checkpoints.gguf.load import load_gguf_network, open_gguf
from blockpress.errors import BlockpressError
from tests.builders.files import same
from tests.builders.gguf_files import weights_of

ROOM = 512 << 20
SECONDS = 20


def damaged(whole: bytes, header: int, count: int, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """Cut files, wrong counts, wrong versions, huge lengths in every place that may hold one, and flipped bits."""
    for end in [
        0,
        3,
        4,
        8,
        23,
        24,
        header - 1,
        header,
        len(whole) - 1,
        *(draw.randrange(len(whole)) for _ in range(20)),
    ]:
        yield f"cut at {end}", whole[:end]
    for place, form in ((4, "<I"), (8, "<Q"), (16, "<Q")):
        for value in (0, 1, 99, 2**16, 2**31, 2**32 - 1, 2**40, 2**63):
            if value < 2 ** (8 * struct.calcsize(form)):
                yield f"{value} at {place}", put(whole, place, struct.pack(form, value))
    for _ in range(count):
        place, value = draw.randrange(24, header - 8), draw.choice([2**31, 2**40, 2**63, 2**64 - 1])
        yield f"{value} at {place}", put(whole, place, struct.pack("<Q", value))
        place, bit = draw.randrange(header), 1 << draw.randrange(8)
        yield f"bit {bit} at {place}", put(whole, place, bytes([whole[place] ^ bit]))
        place, byte = draw.randrange(header), draw.randrange(256)
        yield f"byte {byte} at {place}", put(whole, place, bytes([byte]))
    yield "another magic", put(whole, 0, b"FUGG")
    yield "big-endian", put(whole, 4, struct.pack(">I", 3))


def put(whole: bytes, place: int, part: bytes) -> bytes:
    return whole[:place] + part + whole[place + len(part) :]


def outcome(file: Path, truth: dict[str, torch.Tensor]) -> str:
    """What became of it: `refused`, `loaded` (with the same weights), or what must not be."""
    signal.alarm(SECONDS)
    try:
        network = load_gguf_network(file, dtype="float32")
        open_gguf(file).tokenizer()
    except BlockpressError as error:
        return "refused" if error.message and error.hint else "refused without a word"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return "loaded" if same(weights_of(network), truth) else "loaded, but other weights"


def main(name: str, count: int, seed: int) -> None:
    torch.set_num_threads(1)
    whole = Path(name).read_bytes()
    truth = weights_of(load_gguf_network(name, dtype="float32"))
    header = min(tensor.start for tensor in read_header(Path(name)).tensors.values())
    open_gguf(name).tokenizer()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.gguf"
        for what, data in damaged(whole, header, count, random.Random(seed)):
            file.write_bytes(data)
            found.setdefault(outcome(file, truth), []).append(what)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
