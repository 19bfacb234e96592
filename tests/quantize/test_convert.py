"""Conversion of whole checkpoints: values, names and config as compressed-tensors reads them, and a safe output."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from safetensors.torch import save_file
from torch import Tensor

from blockpress.checkpoints import load_network, minimal_vision, save_checkpoint
from blockpress.checkpoints.index import read_index
from blockpress.checkpoints.safetensors.stream import CODES
from blockpress.config import PRESETS, GenerationConfig
from blockpress.errors import BlockpressError, CheckpointError, RequestError, UnexpectedWeights
from blockpress.model import Network
from blockpress.model.layers import packed_weights
from blockpress.quantize.convert import REPORT, Converted, convert_checkpoint
from blockpress.quantize.encoders import FORMATS, Format, format_named, quantization_config
from blockpress.quantize.recipe import make_recipe
from tests.builders.files import change_json, change_tensors, figures, same, snapshot, tensors_of
from tests.conftest import RandomNetwork
from tests.forks import python
from tests.quantize.oracle import restore

pytestmark = pytest.mark.parity

LINEAR = ("self_attn", "mlp", "experts", "self_conditioning")
SMALLER = [format_named(name) for name in FORMATS]
named = pytest.mark.parametrize("form", SMALLER, ids=lambda form: form.name)


@pytest.fixture(scope="module")
def source(workspace: Path, random_network: RandomNetwork) -> Path:
    """A checkpoint whose columns (64, 96, 32) fit every format, in bfloat16 and in shards, with its files beside it."""
    config = replace(PRESETS["tiny"](), hidden_size=64, intermediate_size=96, expert_size=32, dtype="bfloat16")
    config = replace(config, vision=minimal_vision(0, 64)[0])
    folder, kept = workspace / "convert", minimal_vision(0, 64)[1]
    network = random_network(config, 3)
    save_checkpoint(folder, network, generation=GenerationConfig(), kept=kept, dtype="bfloat16", shard_bytes=60_000)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("measured: 73 %")
    return folder


def modules_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each quantised module, by the last part of their names."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors_of(folder).items():
        home, _, part = name.rpartition(".")
        found.setdefault(home, {})[part] = tensor
    return {home: parts for home, parts in found.items() if "weight_scale" in parts}


def restored(folder: Path, form: Format) -> dict[str, Tensor]:
    """The checkpoint with plain weights again, by compressed-tensors; experts one by one are stacked."""
    modules = modules_of(folder)
    plain = {n: t for n, t in tensors_of(folder).items() if n.rpartition(".")[0] not in modules}
    matrices = {home: restore(form, parts) for home, parts in modules.items()}
    matrices |= {
        n.removesuffix(".weight"): plain.pop(n) for n in list(plain) if ".experts." in n and n.endswith(".weight")
    }
    for home in {home.partition(".experts.")[0] for home in matrices if ".experts." in home}:
        count = len({h.split(".experts.")[1].split(".")[0] for h in matrices if h.startswith(home + ".experts.")})
        take = [{n: matrices.pop(f"{home}.experts.{e}.{n}_proj") for n in ("gate", "up", "down")} for e in range(count)]
        plain[f"{home}.experts.gate_up_proj"] = torch.stack([torch.cat((one["gate"], one["up"])) for one in take])
        plain[f"{home}.experts.down_proj"] = torch.stack([one["down"] for one in take])
    return plain | {f"{home}.weight": matrix for home, matrix in matrices.items()}


def as_plain(folder: Path, form: Format, source: Path, to: Path) -> Path:
    """The quantised checkpoint as a plain one, which every loader reads."""
    to.mkdir()
    save_file(
        {n: t.contiguous() for n, t in restored(folder, form).items()},
        to / "model.safetensors",
        metadata={"format": "pt"},
    )
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(source / name, to / name)
    return to


@named
def test_the_converted_checkpoint_restores_to_the_original_within_the_reported_error(
    form: Format, source: Path, tmp_path: Path
) -> None:
    done = convert_checkpoint(source, tmp_path / "out", form, shard_bytes=50_000)
    original, back = tensors_of(source), restored(tmp_path / "out", form)
    assert back.keys() == original.keys()
    reported = {tensor.name: tensor.error for tensor in done.tensors}
    assert set(reported) == {
        name
        for name, t in original.items()
        if ".decoder." in name and t.ndim > 1 and any(f".{p}." in name for p in LINEAR)
    }
    for name, tensor in original.items():
        if name not in reported:
            assert torch.equal(back[name], tensor), f"{name} is copied as it is"
            continue
        x, y = tensor.double(), back[name].double()
        assert back[name].shape == tensor.shape and back[name].dtype == torch.bfloat16
        assert reported[name].relative == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-4)
        assert 0 < reported[name].relative < 0.13
    assert not done.notes
    assert done.bytes_after == sum(t.nbytes for t in tensors_of(tmp_path / "out").values()) < done.bytes_before


@named
def test_names_types_and_shapes_are_those_of_the_recipe(form: Format, source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "out", form)
    stored = {name: (t.dtype, t.shape) for name, t in read_index(source).items()}
    slots = {slot.name: (slot.code, slot.shape) for slot in make_recipe(stored, form).slots()}
    assert {name: (CODES[t.dtype], tuple(t.shape)) for name, t in tensors_of(tmp_path / "out").items()} == slots
    layer = "model.decoder.layers.1.experts.3.down_proj"
    packed = {"fp8": "weight", "int8": "weight", "int4": "weight_packed", "nvfp4": "weight_packed"}[form.name]
    assert f"{layer}.{packed}" in slots and f"{layer}.weight_scale" in slots
    assert not any("gate_up_proj" in name for name in slots), "experts are stored one by one"


@named
def test_compressed_tensors_accepts_the_config_and_targets_the_layers_that_are_smaller(
    form: Format, source: Path, tmp_path: Path
) -> None:
    convert_checkpoint(source, tmp_path / "out", form, keep=["*layers.0.self_attn.q_proj"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    understood = QuantizationConfig.model_validate(config["quantization_config"])
    assert understood.quantization_status == "compressed" and understood.format == form.compression
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    assert plain == json.loads((source / "config.json").read_text())
    modules = modules_of(tmp_path / "out")
    every = {
        n.removesuffix(".weight")
        for n, t in tensors_of(tmp_path / "out").items()
        if n.endswith(".weight") and t.ndim == 2
    }
    for name in every | set(modules):
        ignored = any(match_name(name, pattern) for pattern in understood.ignore or [])
        embedding = "embed_tokens" in name  # an embedding is no linear layer, so that no target reaches it
        assert ignored != (name in modules) or embedding, name


def test_other_files_are_copied_except_the_model_card(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_checkpoint(source, out, format_named("fp8"))
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "README.md").exists()
    report = json.loads((out / REPORT).read_text())
    assert report["format"] == "fp8" and len(report["tensors"]) == 2 * 9 + 3 - 1
    assert set(report["kinds"]) == {"attention", "dense MLP", "experts", "self-conditioning"}


def test_kept_layers_are_copied_and_listed(source: Path, tmp_path: Path) -> None:
    patterns = ["*.self_attn.*", "*layers.0.experts.down_proj", "*layers.1.experts*", "nothing.*"]
    done = convert_checkpoint(source, tmp_path / "out", format_named("int8"), keep=patterns)
    names = set(tensors_of(tmp_path / "out"))
    assert "model.decoder.layers.1.experts.gate_up_proj" in names, "a layer whose experts are all kept stays stacked"
    assert "model.decoder.layers.0.experts.0.down_proj.weight" in names
    assert "model.decoder.layers.0.experts.0.down_proj.weight_scale" not in names
    assert "model.decoder.layers.0.experts.0.gate_proj.weight_scale" in names
    assert not any("self_attn" in tensor.name for tensor in done.tensors)
    assert "model.decoder.layers.0.self_attn.q_proj" in done.ignore
    assert done.notes == ("nothing is called nothing.*: --keep has no effect",)
    original, back = tensors_of(source), restored(tmp_path / "out", format_named("int8"))
    for name in ("model.decoder.layers.0.experts.down_proj", "model.decoder.layers.1.experts.gate_up_proj"):
        assert torch.equal(back[name], original[name])


def test_experts_alone_can_be_converted(source: Path, tmp_path: Path) -> None:
    done = convert_checkpoint(source, tmp_path / "out", format_named("nvfp4"), experts_only=True)
    assert set(done.kinds) == {"experts"}
    assert "model.decoder.self_conditioning.up_proj" in done.ignore


def test_layers_whose_columns_do_not_fit_are_kept_with_a_note(single: Path, tmp_path: Path) -> None:
    done = convert_checkpoint(single, tmp_path / "out", format_named("int4"))
    assert len(done.notes) == 5 and all("do not fit int4" in text for text in done.notes)
    assert "model.decoder.layers.0.mlp.down_proj" in done.ignore and not any(
        t.name.endswith("down_proj") for t in done.tensors if "experts" in t.name
    )
    back = restored(tmp_path / "out", format_named("int4"))
    assert torch.equal(
        back["model.decoder.layers.0.experts.down_proj"], tensors_of(single)["model.decoder.layers.0.experts.down_proj"]
    )


def test_fused_layers_share_their_global_scale(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "out", format_named("nvfp4"))
    modules = modules_of(tmp_path / "out")
    outer = {home: float(parts["weight_global_scale"]) for home, parts in modules.items()}
    layer = "model.decoder.layers.0."
    assert outer[layer + "self_attn.q_proj"] == outer[layer + "self_attn.k_proj"] == outer[layer + "self_attn.v_proj"]
    assert outer[layer + "mlp.gate_proj"] == outer[layer + "mlp.up_proj"] != outer[layer + "mlp.down_proj"]
    assert (
        outer[layer + "experts.2.gate_proj"] == outer[layer + "experts.2.up_proj"] != outer[layer + "experts.1.up_proj"]
    )


def test_the_same_checkpoint_gives_the_same_files(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert_checkpoint(source, tmp_path / name, format_named("nvfp4"), shard_bytes=50_000)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_logits_of_what_is_restored_are_nearer_with_more_bits(source: Path, tmp_path: Path) -> None:
    truth = figures(load_network(source, dtype="float32"))
    missed = {}
    for form in SMALLER:
        convert_checkpoint(source, tmp_path / form.name, form)
        plain = as_plain(tmp_path / form.name, form, source, tmp_path / f"{form.name}-plain")
        missed[form.name] = float((figures(load_network(plain, dtype="float32")) - truth).norm() / truth.norm())
    assert 0 < missed["int8"] < missed["fp8"] < min(missed["nvfp4"], missed["int4"]) < 1


def unpacked(network: Network) -> dict[str, Tensor]:
    """The values of every packed weight of a network, as its layout's specification rounds them."""
    return {
        f"{home}.{name}": weight.unpack(torch.bfloat16)
        for home, module in network.named_modules()
        for name, weight in packed_weights(module).items()
    }


@named
def test_our_loader_reads_the_values_that_compressed_tensors_reads(form: Format, source: Path, tmp_path: Path) -> None:
    done = convert_checkpoint(source, tmp_path / "out", form)
    plain = as_plain(tmp_path / "out", form, source, tmp_path / "plain")
    packed, restored_ = unpacked(load_network(tmp_path / "out")), load_network(plain).state_dict()
    assert {f"model.decoder.{name}" for name in packed} == {tensor.name for tensor in done.tensors}
    for name, values in packed.items():
        assert torch.equal(values, restored_[name]), name


def refused(kind: type[BlockpressError], source: Path, target: Path, form: Format | None = None, **how: object) -> str:
    with pytest.raises(kind) as caught:
        convert_checkpoint(source, target, form or format_named("fp8"), **how)  # type: ignore[arg-type]
    assert caught.value.hint
    return caught.value.message


def test_unconvertible_models_are_refused_by_name(
    source: Path, copied: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    convert_checkpoint(source, out, format_named("fp8"))
    before = snapshot(out)
    assert "quantised already" in refused(CheckpointError, out, tmp_path / "again")
    assert "itself" in refused(RequestError, source, source / ".." / source.name)
    assert "would become smaller" in refused(RequestError, source, out, keep=["*"])

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.decoder.layers.1.experts.down_proj"][2, 0, 0] = torch.nan

    broken = copied()
    change_tensors(broken, spoil)
    assert "experts.down_proj[2]" in refused(CheckpointError, broken, out)
    change_tensors(
        broken, lambda tensors: tensors.update({"model.decoder.norm.weight": torch.ones(32, dtype=torch.int8)})
    )
    assert "model.decoder.norm.weight is stored as I8" in refused(CheckpointError, broken, out)
    change_json(
        broken / "config.json", lambda data: data["text_config"].update(quantization_config={"quant_method": "awq"})
    )
    assert "'awq'" in refused(CheckpointError, broken, out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    assert "GiB left" in refused(CheckpointError, source, out)
    assert snapshot(out) == before, "whatever went wrong, the older checkpoint stays and nothing is left beside it"


def test_tied_tensors_are_compared_and_left_out(copied: Callable[..., Path], tmp_path: Path) -> None:
    folder, name = copied(), "model.encoder.language_model.layers.0.mlp.up_proj.weight"
    mine = name.replace("encoder.language_model", "decoder")
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[mine].clone()}))
    convert_checkpoint(folder, tmp_path / "out", format_named("fp8"))
    assert name not in tensors_of(tmp_path / "out")
    change_tensors(folder, lambda tensors: tensors[name].add_(1))
    assert name in refused(UnexpectedWeights, folder, tmp_path / "out")


def test_an_interrupted_conversion_leaves_the_older_checkpoint(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_checkpoint(source, out, format_named("fp8"))
    before = snapshot(out)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, out, format_named("int4"), progress=stop)
    assert snapshot(out) == before
    seen: list[tuple[int, int]] = []
    convert_checkpoint(source, out, format_named("int4"), progress=lambda done, total: seen.append((done, total)))
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] and seen == sorted(seen)
    assert same(restored(out, format_named("int4")), restored(out, format_named("int4"))) and snapshot(out) != before


MEASURE = """
import os, sys, torch
torch.set_num_threads(1)
from blockpress.quantize.encoders import Nvfp4
from blockpress.quantize.convert import convert_checkpoint

def pages(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) * 1024

base = pages("VmRSS")
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
convert_checkpoint(sys.argv[1], sys.argv[2], Nvfp4(search=False))
print(pages("VmHWM") - base)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux' count of pages")
def test_memory_does_not_grow_with_the_checkpoint(workspace: Path) -> None:
    from tests.checkpoints.test_memory import LARGE, hollow

    peaks = []
    for layers in (2, 6):
        config = replace(LARGE, layers=LARGE.layers[:layers], vocab_size=1024)
        sizes = hollow(workspace / f"hollow{layers}", config, layers)
        command = [*python(), "-c", MEASURE, str(workspace / f"hollow{layers}"), str(workspace / f"small{layers}")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append((int(done.stdout), 2 * sum(sizes.values())))
        shutil.rmtree(workspace / f"small{layers}")
    (small, less), (large, total) = peaks
    assert total > 2.5 * less and total > 300 * 2**20
    # The allocator keeps some MiB of what was freed.
    assert large < small + 0.12 * (total - less), f"{small / 2**20:.0f} and {large / 2**20:.0f} MiB"
    assert large < 0.4 * total


def test_the_config_names_its_format_for_show() -> None:
    from blockpress.checkpoints.identify import format_name

    for form in SMALLER:
        assert format_name({"quantization_config": quantization_config(form, [])}) == form.name


def test_the_report_lists_the_worst_first(source: Path, tmp_path: Path) -> None:
    done: Converted = convert_checkpoint(source, tmp_path / "out", format_named("int4"))
    worst = [tensor.error.relative for tensor in done.worst(5)]
    assert worst == sorted((t.error.relative for t in done.tensors), reverse=True)[:5]
