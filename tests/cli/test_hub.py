"""`pull`, `ls` and `rm` as people call them, on a hub of this machine."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from gguf import GGMLQuantizationType as Type

from blockpress.checkpoints import resolve, save_checkpoint
from blockpress.checkpoints.hub import cache as cached
from blockpress.cli.units import format_bytes
from blockpress.config import PRESETS, GenerationConfig, ModelConfig
from blockpress.text.builder import write_digits_tokenizer
from tests.builders.gguf_files import wide, write_gguf
from tests.builders.hub_server import Hub, Repository, in_its_place
from tests.conftest import RandomNetwork
from tests.forks import python

from .conftest import Call, Screen

NAME = "me/some-model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with in_its_place(monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture(scope="module")
def small(workspace: Path, random_network: RandomNetwork) -> Path:
    """A checkpoint of few bytes that answers."""
    path, shipped = workspace / "cli-small", PRESETS["sudoku-nano"]()
    config = replace(PRESETS["tiny"](), vocab_size=shipped.vocab_size, eos_ids=shipped.eos_ids)
    save_checkpoint(path, random_network(config), generation=GenerationConfig())
    write_digits_tokenizer(path)
    return path


@pytest.fixture
def model(hub: Hub, small: Path) -> Repository:
    hub.repositories[NAME] = Repository({file.name: file.read_bytes() for file in small.iterdir()})
    return hub.repositories[NAME]


@pytest.fixture(scope="session")
def ggufs(tiny: ModelConfig, workspace: Path) -> dict[str, bytes]:
    """Two GGUF files by their names."""
    made = {}
    for name, kind, number in (("a-Q4_K_M.gguf", "Q4_K", 15), ("a-Q8_0.gguf", "Q8_0", 7)):
        file = workspace / name
        write_gguf(file, wide(tiny), kind=Type[kind], keys={"general.file_type": number})
        made[name] = file.read_bytes()
    return made


class TestPull:
    def test_a_model_is_pulled_listed_run_and_removed(self, call: Call, model: Repository, small: Path) -> None:
        done = call("pull", NAME)
        assert done.code == 0 and f"{NAME}: {len(model.files)} files fetched" in done.out and "\x1b" not in done.err
        listed = done.err.splitlines()
        assert len(listed) == len(model.files) and listed[-1].startswith("model.safetensors  ")
        asked = ("1", "--seed", 3, "--steps", 3, "--max-tokens", 20, "--json")
        said = call("run", NAME, *asked)
        assert said.code == 0 and said.out == call("run", small, *asked).out
        assert "already there" in call("pull", NAME).out
        row = json.loads(call("ls", "--json").out)["models"][-1]
        assert row["name"] == NAME and row["revision"] == model.commit and row["refs"] == ["main"]
        assert row["bytes"] == sum(map(len, model.files.values())) and row["missing"] is None
        on_disk = sum(file.stat().st_size for file in (cached.home_of(NAME) / "blobs").iterdir())
        gone = json.loads(call("rm", NAME, "--yes", "--json").out)
        assert gone == {"removed": NAME, "revision": None, "freed": on_disk}
        assert not cached.home_of(NAME).exists() and call("show", NAME).code == 2

    def test_json_reports_what_was_fetched(self, call: Call, model: Repository) -> None:
        said = json.loads(call("pull", f"{NAME}@v1", "--json").out)
        assert said["path"] == str(resolve(f"{NAME}@v1")) and said["missing"] is None
        assert said["files_fetched"] == len(model.files) and said["bytes_fetched"] == sum(
            map(len, model.files.values())
        )

    def test_a_partial_pull_is_reported_as_no_model(self, call: Call, model: Repository) -> None:
        done = call("pull", NAME, "--include", "*.json")
        assert done.code == 0 and "not a whole model yet: there are no weights" in done.out
        assert call("pull", NAME, "--exclude", "tokenizer*").code == 0
        assert "not a whole" not in call("pull", NAME).out

    def test_one_of_several_gguf_files_is_pulled(self, call: Call, hub: Hub, ggufs: dict[str, bytes]) -> None:
        hub.repositories[NAME] = Repository({**ggufs, "README.md": b"#"})
        asked = call("pull", NAME)
        assert asked.code == 2 and "--file" in asked.err and "a-Q4_K_M.gguf (0.0 GB)" in asked.err
        assert call("pull", NAME, "--file", "a-Q8_0.gguf").code == 0
        (row,) = json.loads(call("ls", "--json").out)["models"][1:]
        assert (row["name"], row["format"], row["family"]) == (f"{NAME}/a-Q8_0.gguf", "Q8_0", "diffusion-gemma")
        assert resolve(NAME) == resolve(f"{NAME}/a-Q8_0.gguf") and resolve(NAME).read_bytes() == ggufs["a-Q8_0.gguf"]
        assert call("pull", f"{NAME}/a-Q4_K_M.gguf").code == 0
        several = call("show", NAME)
        assert several.code == 2 and f"{NAME}/a-Q4_K_M.gguf" in several.err

    def test_a_gguf_file_is_shown(self, call: Call, hub: Hub, ggufs: dict[str, bytes], tiny: ModelConfig) -> None:
        hub.repositories[NAME] = Repository({"a-Q4_K_M.gguf": ggufs["a-Q4_K_M.gguf"], "mmproj-F16.gguf": b"GGUF"})
        call("pull", NAME)
        said = json.loads(call("show", NAME, "--json").out)
        assert said["format"] == "Q4_K_M" and said["tokenizer"] is True and said["canvas"] == tiny.canvas_length
        parts = ["attention", "dense MLP", "embedding", "experts", "router", "self-conditioning"]
        assert said["files"]["quantised"] == parts and said["memory"]["in"].keys() == {"bfloat16"}
        weights, matrices = said["memory"]["in"]["bfloat16"]["weights"], said["total"] - said["parameters"]["norms"]
        assert 144 / 256 * matrices < weights < 144 / 256 * matrices * 1.02 + 4 * said["parameters"]["norms"]
        assert "Q4_K_M, packed by gguf: attention, dense MLP" in call("show", NAME).out

    def test_a_terminal_gets_progress_bars(
        self, model: Repository, call: Call, screen: Screen, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stderr", screen)
        assert call("pull", NAME).code == 0
        assert "model.safetensors" in screen.getvalue() and "\x1b[" in screen.getvalue()

    def test_a_model_that_will_not_fit_is_reported_and_fetched(
        self, call: Call, model: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("blockpress.hardware.free_memory", lambda: {"cpu": 1000})
        done = call("pull", NAME)
        assert done.code == 0 and "it will not run here" in done.err

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["sudoku-nano"], "no name on the hub"),
            ([NAME, "--revision", "a b"], "--revision is 'a b'"),
            ([f"{NAME}@v1", "--revision", "v1"], "--revision is given with"),
            ([NAME, "--file", "x.gguf", "--include", "*"], "--include is given with --file"),
            ([f"{NAME}/x.gguf", "--file", "y.gguf"], "--file is given with"),
            ([NAME, "--revision", "v9"], "no revision 'v9'"),
            (["me/nothing"], "no repository me/nothing"),
        ],
    )
    def test_invalid_arguments_are_refused(
        self, call: Call, model: Repository, arguments: list[str], said: str
    ) -> None:
        done = call("pull", *arguments)
        assert done.code == 2 and said in done.err and "hint" in done.err

    def test_offline_mode_names_what_is_missing(
        self, call: Call, hub: Hub, model: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "me/some-model is not in the cache" in call("pull", NAME).err and hub.requests == []
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        hub.cut["model.safetensors"] = [0] * 20
        call("pull", NAME)
        hub.cut.clear()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        done = call("pull", NAME)
        assert done.code == 2 and "there are no weights" in done.err and "HF_HUB_OFFLINE" in done.err
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        assert call("pull", NAME).code == 0
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "already there" in call("pull", NAME).out
        done = call("pull", NAME, "--include", "*.json")
        assert done.code == 2 and "--include is given with HF_HUB_OFFLINE" in done.err

    @pytest.mark.slow
    def test_the_library_s_environment_variables_are_honoured(
        self, hub: Hub, model: Repository, tmp_path: Path
    ) -> None:
        """A process of its own, as people have it: HF_ENDPOINT and HF_HOME are read when it starts."""
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_x"}

        def start(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
            command = [*python(), "-m", "blockpress", *arguments]
            return subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=120)

        assert start("pull", NAME).returncode == 0
        assert (tmp_path / "home" / "hub" / "models--me--some-model" / "refs" / "main").read_text() == model.commit
        assert NAME in start("ls", HF_HUB_OFFLINE="1").stdout


def on_a_terminal(hub: Hub, home: Path, typed: bytes, *arguments: str) -> tuple[int, str]:
    """A command on a pseudo-terminal, in a process of its own: how it ended and what stood on the screen."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "TERM": "xterm", "COLUMNS": "200"}
    ours, theirs = pty.openpty()
    command = [*python(), "-m", "blockpress", *arguments]
    started = subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
    os.close(theirs)
    os.write(ours, typed)
    shown = b""
    with suppress(OSError):  # which is how a terminal says that nobody is at its other end
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    return started.wait(), shown.decode()


class TestOffer:
    """A model of the hub that is not on this machine is pulled where somebody agrees."""

    ASK = ("1", "--max-tokens", 4, "--steps", 1)

    def test_without_a_terminal_the_command_is_named(self, call: Call, model: Repository, tmp_path: Path) -> None:
        for command in (
            ("run", NAME, "1"),
            ("show", NAME),
            ("bench", NAME),
            ("quantize", NAME, tmp_path / "q", "--format", "int4"),
        ):
            done = call(*command)
            assert done.code == 2 and not done.out and f"`blockpress pull {NAME}`" in done.err and "--yes" in done.err

    def test_yes_pulls_it_first(self, call: Call, hub: Hub, model: Repository, small: Path) -> None:
        done = call("run", NAME, *self.ASK, "--yes", "--json")
        assert done.code == 0 and done.out == call("run", small, *self.ASK, "--json").out
        assert "model.safetensors  " in done.err
        hub.requests.clear()
        assert call("run", NAME, *self.ASK, "--yes").code == call("show", NAME).code == 0 and not hub.requests

    def test_a_cut_download_goes_on(self, call: Call, hub: Hub, model: Repository) -> None:
        hub.cut["model.safetensors"] = [5_000] + [0] * 20
        assert call("pull", NAME).code == 2
        hub.cut.clear()
        refused = call("show", NAME)
        assert refused.code == 2 and "not complete" in refused.err and "--yes" in refused.err
        assert call("show", NAME, "--yes").code == 0

    def test_one_of_several_gguf_files_has_to_be_named(self, call: Call, hub: Hub, ggufs: dict[str, bytes]) -> None:
        hub.repositories[NAME] = Repository(dict(ggufs))
        done = call("show", NAME, "--yes")
        assert done.code == 2 and f"{NAME}/FILE: a-Q4_K_M.gguf" in done.err
        assert call("show", f"{NAME}/a-Q4_K_M.gguf", "--yes").code == 0

    def test_a_name_that_the_hub_lacks_may_have_been_a_path(self, call: Call, model: Repository) -> None:
        done = call("run", "me/absent", "1", "--yes")
        assert done.code == 2 and "no model or directory 'me/absent'; there is no repository me/absent" in done.err
        assert "--yes" not in call("run", "absent", "1").err, "no name of the hub"

    def test_offline_nothing_is_offered(
        self, call: Call, hub: Hub, model: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert call("run", NAME, "1", "--yes").code == 2 and not hub.requests

    def test_a_full_disk_is_found_before_anybody_is_asked(
        self, call: Call, model: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("blockpress.cli.hub.terminal.is_terminal", lambda stream: stream is not sys.stdout)
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
        done = call("show", NAME, stdin="y\n")
        assert done.code == 2 and "GB of disk" in done.err and "[y/N]" not in done.err

    @pytest.mark.parametrize("free", [1000, 1 << 40])
    def test_it_says_what_it_takes(
        self, free: int, call: Call, model: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("blockpress.cli.hub.terminal.is_terminal", lambda stream: stream is not sys.stdout)
        monkeypatch.setattr("blockpress.hardware.free_memory", lambda: {"cpu": free})
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=7 << 30))
        count = format_bytes(sum(map(len, model.files.values())))
        for answer in ("n\n", "", "\n"):
            no = call("show", NAME, stdin=answer)
            assert no.code == 2 and not no.out and f"blockpress pull {NAME}" in no.err
            assert f"{len(model.files)} files, {count} to fetch; 7.0 GiB are free on the disk of " in no.err
            assert ("they fit" if free > 1000 else "it will not run here as it is") in no.err
            assert not cached.home_of(NAME).exists()
        assert call("show", NAME, "--json", stdin="yes\n").code == 0

    @pytest.mark.slow
    def test_a_terminal_is_asked(self, hub: Hub, model: Repository, tmp_path: Path) -> None:
        code, shown = on_a_terminal(hub, tmp_path / "home", b"n\n", "show", NAME)
        assert code == 2 and "Pull it? [y/N]" in shown and f"blockpress pull {NAME}" in shown
        code, shown = on_a_terminal(hub, tmp_path / "home", b"y\n", "run", NAME, *map(str, self.ASK))
        assert code == 0 and "Pull it? [y/N]" in shown and "model.safetensors" in shown
        code, shown = on_a_terminal(hub, tmp_path / "home", b"", "show", NAME)
        assert code == 0 and "Pull it?" not in shown and "parameters" in shown


class TestList:
    def test_shipped_and_cached_models_are_listed(self, call: Call, hub: Hub, model: Repository) -> None:
        assert "sudoku-nano" in call("ls").out and not cached.cache_directory().exists()
        call("pull", NAME)
        other = json.loads(model.files["config.json"]) | {"model_type": "llama"}
        hub.repositories["me/llama"] = Repository(model.files | {"config.json": json.dumps(other).encode()})
        call("pull", "me/llama")
        text = call("ls").out
        assert NAME in text and model.commit[:12] + " (main)" in text and "just now" in text and "llama" not in text

    def test_a_partial_download_is_marked(self, call: Call, hub: Hub, model: Repository) -> None:
        hub.cut["model.safetensors"] = [5_000] + [0] * 20
        assert call("pull", NAME).code == 2
        assert "partial: there are no weights" in call("ls").out
        error = call("show", NAME)
        assert error.code == 2 and "not complete" in error.err and f"blockpress pull {NAME}" in error.err

    def test_a_damaged_config_hides_nothing(self, call: Call, model: Repository) -> None:
        call("pull", NAME)
        (cached.home_of(NAME) / "snapshots" / model.commit / "config.json").resolve().write_bytes(b"{")
        done = call("ls")
        assert done.code == 0 and NAME in done.out and "not JSON" in done.out and "sudoku-nano" in done.out


class TestRemove:
    def test_one_of_two_commits_keeps_what_the_other_needs(self, call: Call, model: Repository) -> None:
        call("pull", NAME)
        old, before = model.commit, len(model.files["config.json"])
        model.files["config.json"] += b"\n"
        call("pull", NAME)
        done = call("rm", NAME, "--revision", old[:8], "--yes")
        assert done.code == 0 and done.out == f"removed {NAME} at {old[:12]}: {format_bytes(before)} freed\n"
        assert resolve(NAME).name == model.commit and (resolve(NAME) / "model.safetensors").is_file()
        assert call("show", f"{NAME}@{old}").code == 2

    def test_removing_asks_on_a_terminal_and_needs_yes_elsewhere(
        self, call: Call, model: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        call("pull", NAME)
        refused = call("rm", NAME)
        assert refused.code == 2 and "--yes" in refused.err and "frees" in refused.err
        monkeypatch.setattr("blockpress.cli.hub.terminal.is_terminal", lambda stream: True)
        assert call("rm", NAME, stdin="n\n").code == 2 and call("rm", NAME, stdin="").code == 2
        assert cached.home_of(NAME).exists()
        done = call("rm", NAME, stdin="y\n")
        assert done.code == 0 and "[y/N]" in done.out and not cached.home_of(NAME).exists()

    def test_a_link_that_leads_out_of_the_cache_is_not_followed(
        self, call: Call, model: Repository, tmp_path: Path
    ) -> None:
        call("pull", NAME)
        home = cached.home_of(NAME)
        home.rename(tmp_path / "elsewhere")
        home.symlink_to(tmp_path / "elsewhere")
        done = call("rm", NAME, "--yes")
        assert done.code == 2 and "cannot be removed" in done.err and (tmp_path / "elsewhere" / "snapshots").is_dir()

    def test_a_download_without_any_bytes_is_removed_too(self, call: Call, hub: Hub, model: Repository) -> None:
        first = min(model.files, key=lambda path: len(model.files[path]))
        hub.cut[first] = [0] * 20
        assert call("pull", NAME).code == 2
        assert call("rm", NAME, "--yes").code == 0 and not cached.home_of(NAME).exists()

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("sudoku-nano", "comes with blockpress"),
            ("{folder}", "is a path"),
            ("me/absent", "does not hold me/absent"),
            ("~nobody-of-that-name", "no name on the hub"),
            ("a" * 300, "no name on the hub"),
            ("me/" + "a" * 300, "no name on the hub"),
            ("nothing", "no name on the hub"),
            (f"{NAME}@v7", "does not hold revision 'v7'"),
            (f"{NAME}/x.gguf", "one file of a model"),
        ],
    )
    def test_names_outside_the_cache_are_refused(
        self, call: Call, model: Repository, tmp_path: Path, name: str, said: str
    ) -> None:
        call("pull", NAME)
        (tmp_path / "folder").mkdir()
        done = call("rm", name.format(folder=tmp_path / "folder"), "--yes")
        assert done.code == 2 and said in done.err
        assert (tmp_path / "folder").is_dir() and resolve("sudoku-nano").is_dir() and cached.home_of(NAME).is_dir()
