"""Quantised checkpoints that are damaged: the same weights as before, or an error of ours, and nothing else.

What cannot be seen (a bit inside the weights' data) is left out: headers, JSON, structure and scales are changed.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockpress.checkpoints import load_network
from blockpress.errors import (
    BlockpressError,
    CheckpointError,
    DamagedFile,
    MissingWeights,
)
from blockpress.model import Network
from blockpress.model.layers import packed_weights
from tests.builders.files import INDEX, SINGLE, bits, change_json, refusal
from tests.builders.quantised import FORMS, write

pytestmark = [pytest.mark.slow, pytest.mark.end_to_end]

NAMES = ("fp8 channel", "int8 group asymmetric", "int4 group asymmetric", "nvfp4", "modelopt nvfp4")
QUERY = "model.decoder.layers.0.self_attn.q_proj"
EXPERT = "model.decoder.layers.1.experts.2.down_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("whole")
    return {name: write(home / name.replace(" ", "-"), FORMS[name]).folder for name in NAMES}


def contents(network: Network) -> dict[str, Any]:
    """Every bit of a network's weights, packed ones as they lie."""
    plain = {name: bits(tensor) for name, tensor in network.state_dict().items()}
    packed = {
        f"{name}.{leaf}.{part}": bits(tensor)
        for name, module in network.named_modules()
        for leaf, weight in packed_weights(module).items()
        for part, tensor in weight.tensors().items()  # type: ignore[attr-defined]
    }
    return plain | packed


def loads_equal_or_refuses(folder: Path, wanted: dict[str, Any], what: object) -> bool:
    """Whether it is refused; any other exception fails the test."""
    refused, network = None, None
    try:
        network = load_network(folder)
    except BlockpressError as error:
        refused = error
    if network is not None:
        assert contents(network) == wanted, what
    else:
        assert refused is not None and refused.hint and "\n" not in str(refused), what
    return refused is not None


@pytest.fixture
def little_memory() -> Iterator[None]:
    """No more than 2 GiB beyond what the process has: a size that a header invents is not allocated."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("little_memory")
def test_changed_header_bytes_are_refused_or_harmless(name: str, whole: dict[str, Path], tmp_path: Path) -> None:
    wanted = contents(load_network(whole[name]))
    file = Path(shutil.copytree(whole[name], tmp_path / "copy")) / SINGLE
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    draw, refused = random.Random(name), 0
    places = [*range(8), *(draw.randrange(8, end) for _ in range(32))]
    for place in places:
        changed = bytearray(data)
        changed[place] = draw.choice([changed[place] ^ 1 << draw.randrange(8), draw.choice(b'0123456789"[]{},:')])
        if changed == data:
            continue
        file.write_bytes(changed)
        refused += loads_equal_or_refuses(file.parent, wanted, (place, changed[place]))
    assert refused > len(places) // 2


@pytest.mark.parametrize("name", NAMES)
def test_truncated_files_are_refused(name: str, whole: dict[str, Path], tmp_path: Path) -> None:
    file = Path(shutil.copytree(whole[name], tmp_path / "copy")) / SINGLE
    data = file.read_bytes()
    draw = random.Random(name)
    for size in (0, 7, 8, *(draw.randrange(len(data)) for _ in range(6)), len(data) - 1):
        file.write_bytes(data[:size])
        assert type(refusal(file.parent)) is DamagedFile, size


@pytest.mark.parametrize("name", NAMES)
def test_changed_tensors_are_refused_or_harmless(name: str, whole: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole[name], tmp_path / "copy"))
    wanted, tensors = contents(load_network(folder)), load_file(folder / SINGLE)
    draw = random.Random(name)
    for number in range(24):
        # Without the causal pass's own scalars the canvas's count, so their loss is not seen.
        changed, victim = dict(tensors), draw.choice(sorted(name for name in tensors if "encoder" not in name))
        gone = changed.pop(victim)
        match number % 4:
            case 1:
                changed[victim] = gone.to(
                    draw.choice([torch.int16, torch.uint8, torch.float64, torch.bool, torch.int64])
                )
            case 2:
                changed[victim] = gone.repeat((2,) + (1,) * (gone.ndim - 1)) if gone.ndim else gone.repeat(2)
            case 3:
                changed[victim.replace("layers.0", "layers.7").replace("proj", "prodj")] = gone
        save_file(changed, folder / SINGLE)
        # Values in another type of float are the values all the same; a weight's own shape may be left out.
        loads_equal_or_refuses(folder, wanted, (number % 4, victim))
        if number % 4 == 0 and not victim.endswith(("input_scale", "weight_shape", "layer_scalar")):
            assert type(refusal(folder)) is MissingWeights, victim


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value of a JSON object, the inner ones too."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, key))


ODD = [None, 0, 3, -1, 10**30, 1.5, "", "float", "int", "group", "re:(", [], [3], {}, {"a": 1}, True, False]


@pytest.mark.parametrize("name", NAMES)
def test_changed_quantization_fields_are_refused_or_harmless(name: str, whole: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole[name], tmp_path / "copy"))
    wanted, data = contents(load_network(folder)), json.loads((folder / "config.json").read_text())
    draw, refused, tried = random.Random(name), 0, 0
    for path in leaves(data["quantization_config"]):
        for value in (*draw.sample(ODD, 3), "gone"):
            changed = copy.deepcopy(data)
            place = changed["quantization_config"]
            for key in path[:-1]:
                place = place[key]
            if value == "gone":
                del place[path[-1]]
            else:
                place[path[-1]] = value
            (folder / "config.json").write_text(json.dumps(changed))
            refused += loads_equal_or_refuses(folder, wanted, (path, value))
            tried += 1
    assert refused > tried // 6
    assert tried > 10


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["weight_map"].update({f"{EXPERT}.weight_scale": "model-00099-of-00003.safetensors"}),
        lambda d: d["weight_map"].update({f"{EXPERT}.weight_scale_9": next(iter(d["weight_map"].values()))}),
        lambda d: d["weight_map"].update({f"{EXPERT}.weight_scale": "../model.safetensors"}),
    ],
    ids=["a shard that is not there", "a tensor that no shard holds", "a shard elsewhere"],
)
def test_a_wrong_index_is_refused(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    folder = write(tmp_path, FORMS["nvfp4"], shard_bytes=20_000).folder
    change_json(folder / INDEX, change)
    assert isinstance(refusal(folder), CheckpointError)
