"""A whole pull from a hub on this machine, and everything that a real hub, a network or a disk does to one."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import RepoFile, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import close_session

from blockpress import load
from blockpress.checkpoints import load_network, resolve
from blockpress.checkpoints.hub import cache as cached
from blockpress.checkpoints.hub.cache import HubName
from blockpress.checkpoints.hub.download import check_room, fetch, plan
from blockpress.checkpoints.hub.selection import select_files
from blockpress.errors import CheckpointError, HubError, ModelNotFound, RequestError
from tests.builders.files import figures
from tests.builders.hub_server import Hub, Repository, git_name, in_its_place

NAME = HubName(repo="me/some-model")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with in_its_place(monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture
def model(hub: Hub, sharded: Path) -> Repository:
    """A real checkpoint in shards, among what repositories hold besides."""
    files = {file.name: file.read_bytes() for file in sharded.iterdir()}
    files |= {"README.md": b"# A model", "pytorch_model.bin": b"pickle" * 99, "onnx/model.onnx": b"o" * 99}
    files |= {
        "original/consolidated.safetensors": b"twice",
        "training.pt": b"p",
        "chat_template.jinja": b"{{ messages }}",
    }
    hub.repositories[NAME.repo] = Repository(files)
    return hub.repositories[NAME.repo]


def pull(name: HubName = NAME, **arguments: object) -> Path:
    """As in a process of its own: a connection that a server has cut is not used again."""
    close_session()
    return fetch(plan(name, **arguments))  # type: ignore[arg-type]


def refused(name: HubName = NAME, **arguments: object) -> HubError:
    with pytest.raises(HubError) as caught:
        pull(name, **arguments)
    assert caught.value.hint and "\n" not in str(caught.value)
    return caught.value


def shard_of(model: Repository) -> str:
    """The largest shard, which is fetched last."""
    return max(
        (path for path in model.files if path.startswith("model-")), key=lambda path: (len(model.files[path]), path)
    )


def blobs() -> dict[str, Path]:
    return {file.name: file for file in (cached.home_of(NAME.repo) / "blobs").iterdir()}


class TestWhole:
    def test_a_pulled_model_loads_by_name(self, model: Repository, sharded: Path) -> None:
        path = pull()
        assert resolve(NAME.repo) == resolve(f"{NAME.repo}@main") == resolve(f"{NAME.repo}@{model.commit[:8]}") == path
        assert torch.equal(figures(load_network(resolve(NAME.repo))), figures(load_network(sharded)))
        assert load(NAME.repo).path == path

    def test_only_what_a_model_needs_is_fetched(self, hub: Hub, model: Repository) -> None:
        path = pull()
        there = {file.name for file in path.rglob("*")}
        assert there == {name for name in model.files if "/" not in name and not name.endswith((".bin", ".pt", ".md"))}
        assert not any(request.path.endswith((".bin", ".pt", ".onnx")) for request in hub.requests)

    def test_other_tools_find_pulled_files_in_the_cache(
        self, model: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = pull()
        assert try_to_load_from_cache(NAME.repo, "config.json") == str(path / "config.json")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert snapshot_download(NAME.repo, local_files_only=True) == str(path)

    def test_files_fetched_by_other_tools_are_reused(self, hub: Hub, model: Repository) -> None:
        path = snapshot_download(
            NAME.repo, allow_patterns=["*.json", "*.safetensors", "*.jinja"], ignore_patterns=["*/*"]
        )
        hub.requests.clear()
        assert plan(NAME).left == () and str(pull()) == path
        assert all(request.path.startswith("/api/") for request in hub.requests)

    def test_a_second_pull_asks_for_the_commit_and_its_files(self, hub: Hub, model: Repository) -> None:
        pull()
        hub.requests.clear()
        pull()
        api = f"/api/models/{NAME.repo}"
        assert [request.path for request in hub.requests] == [f"{api}/revision/main", f"{api}/tree/{model.commit}"]

    def test_a_name_moves_to_a_new_commit_once_it_is_complete(self, hub: Hub, model: Repository) -> None:
        old = pull()
        model.files |= {"config.json": model.files["config.json"] + b"\n", "new.json": b"{}"}
        new = plan(NAME)
        assert new.path != old
        hub.cut["new.json"] = [0] * 20
        with pytest.raises(HubError):
            fetch(new)
        assert resolve(NAME.repo) == old, "until then the old one stands"
        hub.cut.clear()
        hub.requests.clear()
        fetch(new)
        assert resolve(NAME.repo) == new.path and resolve(f"{NAME.repo}@{old.name}") == old
        assert {request.path.rpartition("/")[2] for request in hub.requests if request.method == "GET"} == {
            "new.json",
            "config.json",
        }

    def test_a_name_does_not_move_to_a_partial_commit(self, model: Repository) -> None:
        old = pull()
        model.files["config.json"] += b"\n"
        part = pull(include=["*.json"])
        assert part != old and (part / "config.json").is_file() and resolve(NAME.repo) == old
        assert pull() == resolve(NAME.repo) == part

    def test_a_truncated_ref_is_ignored(self, model: Repository) -> None:
        path = pull()
        (cached.home_of(NAME.repo) / "refs" / "main").write_text("")
        assert cached.commit_of(NAME.repo, "main") is None
        with pytest.raises(ModelNotFound) as caught:
            resolve(NAME.repo)
        assert path.name[:12] in caught.value.hint and pull() == path == resolve(NAME.repo)

    def test_a_revision_is_loaded_by_its_own_name(self, model: Repository) -> None:
        path = pull(HubName(repo=NAME.repo, revision="v1"))
        assert resolve(f"{NAME.repo}@v1") == path
        with pytest.raises(ModelNotFound, match="revision 'main'") as caught:
            resolve(NAME.repo)
        assert path.name[:12] in caught.value.hint

    def test_a_token_goes_to_the_hub_and_nowhere_else(
        self, hub: Hub, model: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        hub.redirects = True
        pull()
        asked = [request for request in hub.requests if "agent" not in request.path]
        elsewhere = [request for request in asked if request.path.startswith("/elsewhere")]
        assert elsewhere and {request.authorization for request in elsewhere} == {None}
        assert {request.authorization for request in asked if request not in elsewhere} == {"Bearer hf_secret"}

    def test_several_pulls_at_once_fetch_every_file_once(self, hub: Hub, model: Repository) -> None:
        with ThreadPoolExecutor(4) as pool:
            paths = set(pool.map(lambda _: pull(), range(4)))
        assert paths == {resolve(NAME.repo)}
        assert all(len(hub.of(f"/{file.name}")) == 1 for file in paths.pop().iterdir())


class TestCut:
    @pytest.mark.parametrize("redirects", [False, True], ids=["from the hub", "from elsewhere"])
    @pytest.mark.parametrize("resets", [False, True], ids=["ended early", "reset"])
    def test_a_broken_connection_resumes_where_it_broke(
        self, hub: Hub, model: Repository, resets: bool, redirects: bool
    ) -> None:
        shard, hub.resets, hub.redirects = shard_of(model), resets, redirects
        hub.cut[shard] = [10_500, 4_200]
        path = pull()
        ranges = [request.range for request in hub.of(shard) if request.path.startswith("/elsewhere") == redirects]
        if resets:  # what the reset overtook is lost
            assert len(ranges) == 3 and ranges[0] is None
        else:
            assert ranges == [None, "bytes=10000-", "bytes=14000-"], "in thousands, as they are written"
        assert (path / shard).read_bytes() == model.files[shard]

    def test_a_cut_download_resumes_with_the_next_pull(self, hub: Hub, model: Repository) -> None:
        shard = shard_of(model)

        def stop(file: RepoFile, done: int) -> None:
            if file.path == shard and done >= 7_000:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fetch(plan(NAME), stop)
        (partial,) = (file for name, file in blobs().items() if name.endswith(".incomplete"))
        half = partial.stat().st_size
        assert 6_000 <= half < len(model.files[shard])
        again = plan(NAME)
        assert [file.path for file in again.left] == [shard]
        assert again.bytes_left == len(model.files[shard]) - half
        hub.requests.clear()
        path = fetch(again)
        assert [request.range for request in hub.of(shard)] == [f"bytes={half}-"]
        assert (path / shard).read_bytes() == model.files[shard]
        assert not any(name.endswith(".incomplete") for name in blobs())

    def test_a_connection_that_always_breaks_is_given_up(self, hub: Hub, model: Repository) -> None:
        hub.cut[shard_of(model)] = [0] * 20
        error = refused()
        assert shard_of(model) in error.message and "pulling again" in error.hint
        assert 2 <= len(hub.of(shard_of(model))) <= 7

    def test_a_partial_snapshot_says_pull_again(self, hub: Hub, model: Repository) -> None:
        hub.cut[shard_of(model)] = [0] * 20
        refused()
        for name in (NAME.repo, f"{NAME.repo}@{model.commit}"):
            with pytest.raises(CheckpointError, match=r"not complete: 1 of \d+ shards are missing") as caught:
                resolve(name)
            assert f"blockpress pull {NAME.repo}" in caught.value.hint
        (entry,) = cached.list_cached()
        assert entry.missing is not None and "1 of" in entry.missing

    def test_progress_ends_at_every_files_size(self, model: Repository) -> None:
        seen: dict[str, list[int]] = {}
        fetch(plan(NAME), lambda file, done: seen.setdefault(file.path, []).append(done))
        assert {path: steps[-1] for path, steps in seen.items()} == {path: len(model.files[path]) for path in seen}
        assert all(steps == sorted(steps) for steps in seen.values())
        assert len(seen[shard_of(model)]) > 5


class TestDamaged:
    @pytest.mark.parametrize("what", ["shard", "config.json"])
    def test_a_wrong_checksum_is_refused_and_removed(
        self, hub: Hub, model: Repository, what: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        damaged = shard_of(model) if what == "shard" else what
        true = model.files[damaged]
        etag, listed = model.etag(damaged), model.tree()
        monkeypatch.setattr(model, "tree", lambda: listed)
        monkeypatch.setattr(model, "etag", lambda path: etag if path == damaged else Repository.etag(model, path))
        commit = model.commit
        monkeypatch.setattr(Repository, "commit", property(lambda self: commit))
        model.files[damaged] = bytes([true[0] ^ 1]) + true[1:]
        error = refused()
        assert damaged in error.message and etag[:12] in error.message
        assert etag not in blobs() and not any(name.endswith(".incomplete") for name in blobs())
        with pytest.raises(CheckpointError):
            resolve(NAME.repo)
        model.files[damaged] = true
        assert (pull() / damaged).read_bytes() == true

    def test_damage_is_found_in_the_library_s_own_downloads_too(self, model: Repository) -> None:
        """The faster protocol brings the file itself; what it brings is checked all the same."""
        shard = shard_of(model)
        model.xet.add(shard)
        model.claims[shard] = "ab" * 32
        assert shard in refused().message
        assert "ab" * 32 not in blobs() and not os.path.lexists(plan(NAME).path / shard)
        del model.claims[shard]
        assert (pull() / shard).read_bytes() == model.files[shard]

    def test_a_file_shorter_than_the_hub_says_is_refused_and_removed(
        self, model: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shard, commit, listed = shard_of(model), model.commit, model.tree()
        monkeypatch.setattr(model, "tree", lambda: listed)
        monkeypatch.setattr(Repository, "commit", property(lambda self: commit))
        size, model.files[shard] = len(model.files[shard]), model.files[shard][:-10]
        assert f"{size - 10:,} bytes" in (said := refused().message) and f"the hub says {size:,} bytes" in said
        assert not any(name.endswith(".incomplete") for name in blobs())

    def test_a_file_of_another_size_is_fetched_anew(self, model: Repository) -> None:
        path = pull()
        blob = (path / "config.json").resolve()
        blob.write_bytes(b"{")
        assert (pull() / "config.json").read_bytes() == model.files["config.json"]

    def test_leftovers_longer_than_the_file_are_dropped(self, model: Repository) -> None:
        shard = shard_of(model)
        leave(model, shard, b"x" * (len(model.files[shard]) + 1))
        assert (pull() / shard).read_bytes() == model.files[shard]

    def test_leftovers_of_other_content_are_dropped(self, hub: Hub, model: Repository) -> None:
        shard = shard_of(model)
        leave(model, shard, b"x" * 100)
        assert (pull() / shard).read_bytes() == model.files[shard]
        assert [request.range for request in hub.of(shard)] == ["bytes=100-", None]


def leave(model: Repository, path: str, content: bytes) -> None:
    """What a pull that was cut would have left of a file."""
    left = cached.home_of(NAME.repo) / "blobs" / f"{model.etag(path)}.incomplete"
    left.parent.mkdir(parents=True)
    left.write_bytes(content)


RANGES = [
    "the rest, 206", "the rest, 200", "all, 200", "all, 206", "other bytes, 206", "other bytes, 200", "nothing, 206",
    "nothing, 200", "416", "400", "501",
]  # fmt: skip


class TestMirror:
    @pytest.mark.parametrize("ranges", RANGES)
    def test_a_leftover_becomes_the_file_or_is_dropped(self, hub: Hub, model: Repository, ranges: str) -> None:
        shard, hub.ranges = shard_of(model), ranges
        leave(model, shard, model.files[shard][:5_000])
        assert (pull() / shard).read_bytes() == model.files[shard]
        assert len(hub.of(shard)) <= 3 and not any(name.endswith(".incomplete") for name in blobs())

    @pytest.mark.parametrize("ranges", RANGES)
    def test_a_broken_connection_ends_in_the_file_or_in_a_reason(
        self, hub: Hub, model: Repository, ranges: str
    ) -> None:
        shard, hub.ranges = shard_of(model), ranges
        hub.cut[shard] = [10_500, 4_200]
        with suppress(HubError):
            pull()
        assert not any(name.endswith(".incomplete") for name in blobs())
        assert (pull() / shard).read_bytes() == model.files[shard]

    @pytest.mark.parametrize("ranges", ["the rest, 200", "other bytes, 206", "416", "501"])
    def test_a_mirror_that_always_breaks_and_never_continues_leaves_nothing(
        self, hub: Hub, model: Repository, ranges: str
    ) -> None:
        shard, hub.ranges = shard_of(model), ranges
        hub.cut[shard] = [3_000] * 40
        error = refused()
        assert shard in error.message and "HF_ENDPOINT" in error.hint
        assert not any(name.endswith(".incomplete") for name in blobs())

    @pytest.mark.parametrize("size", [0, 10, 100_000])
    def test_a_body_of_another_size_is_refused_by_both_sizes(
        self, model: Repository, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shard, commit, listed, etag = shard_of(model), model.commit, model.tree(), model.etag
        etags = {path: etag(path) for path in model.files}
        monkeypatch.setattr(model, "tree", lambda: listed)
        monkeypatch.setattr(model, "etag", etags.__getitem__)
        monkeypatch.setattr(Repository, "commit", property(lambda self: commit))
        whole, model.files[shard] = model.files[shard], (model.files[shard] * 9)[:size]
        assert shard in (said := refused().message) and f"{len(whole):,} bytes" in said
        assert not any(name.endswith(".incomplete") for name in blobs())
        model.files[shard] = whole
        assert (pull() / shard).read_bytes() == whole

    def test_names_of_its_own_for_files_change_nothing(self, hub: Hub, model: Repository) -> None:
        hub.etags = True
        path = pull()
        assert resolve(NAME.repo) == path and plan(NAME).left == ()
        assert all(len(hub.of(f"/{file.name}")) == 1 for file in path.iterdir()), "each is fetched once"
        assert set(blobs()) == {model.etag(file.name) for file in path.iterdir()}

    def test_without_a_tree_the_description_lists_the_files(self, hub: Hub, model: Repository) -> None:
        hub.tree = False
        path = pull()
        assert resolve(NAME.repo) == path
        assert all(file.read_bytes() == model.files[file.name] for file in path.iterdir())

    @pytest.mark.parametrize("listed", [[], [{"rfilename": "config.json"}], "a page of a proxy"])
    def test_an_answer_that_is_no_hub_s_is_refused(
        self, hub: Hub, model: Repository, listed: object, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.tree = False
        monkeypatch.setattr(model, "siblings", lambda: listed)
        error = refused()
        assert NAME.repo in error.message and "HF_ENDPOINT" in error.hint

    def test_a_chunk_store_out_of_reach_is_replaced_by_plain_http(
        self, model: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Mirrors list files of it, and the store is elsewhere."""

        def unreachable(*_: object, **__: object) -> str:
            raise RuntimeError("Data processing error: CAS service error")

        shard = shard_of(model)
        model.xet.add(shard)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
        assert (pull() / shard).read_bytes() == model.files[shard]

    def test_an_empty_file_is_fetched(self, model: Repository) -> None:
        model.files["empty.json"] = b""
        assert (pull() / "empty.json").read_bytes() == b""


class TestRefused:
    CASES = {  # noqa: RUF012
        (401, "GatedRepo"): ("is gated", "hf auth login"),
        (403, "GatedRepo"): ("is gated", "accept its licence at"),
        (404, "RepoNotFound"): ("there is no repository me/some-model", "hf auth login"),
        (401, ""): ("401", "hf auth login"),
        (403, ""): ("refuses me/some-model with 403", "token"),
        (404, "RevisionNotFound"): ("no revision 'main'", "branches"),
        (429, ""): ("answered 429", "wait"),
        (503, ""): ("answered 503", "wait"),
        (418, ""): ("answered 418", "HF_ENDPOINT"),
    }

    @pytest.mark.parametrize(("answer", "said"), CASES.items(), ids=[f"{status} {code}" for status, code in CASES])
    def test_errors_of_the_hub_say_what_to_do(
        self, hub: Hub, model: Repository, answer: tuple[int, str], said: tuple[str, str]
    ) -> None:
        model.refuse = answer
        error = refused()
        assert said[0] in error.message and said[1] in error.hint
        assert len(hub.of("/revision/main")) == 1, "asked once"

    def test_a_logged_in_user_is_told_only_to_accept_the_licence(self, model: Repository) -> None:
        model.refuse = (403, "GatedRepo")
        assert "log in" not in refused().hint

    def test_a_missing_network_is_reported_at_once(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        tries = []

        class Counted(socket.socket):
            def connect(self, address: object) -> None:
                tries.append(address)
                super().connect(address)  # type: ignore[arg-type]

        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(socket, "socket", Counted)
        monkeypatch.setattr(
            "huggingface_hub.file_download.time.sleep", lambda seconds: pytest.fail("it waits and retries")
        )
        error = refused()
        assert "cannot be reached" in error.message and "network" in error.hint
        mine = [address for address in tries if "agent" not in str(address)]
        assert 1 <= len(mine) <= 2, "one question, and at most one of the library's own"

    def test_offline_mode_never_connects(self, hub: Hub, model: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE" in refused().message and hub.requests == []

    def test_a_full_disk_is_reported_before_the_download(
        self, hub: Hub, model: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        needed = plan(NAME)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed.bytes_left + (64 << 20) - 1))
        with pytest.raises(HubError, match="GB of disk") as caught:
            check_room(needed)
        assert "blockpress rm" in caught.value.hint
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed.bytes_left + (64 << 20)))
        check_room(needed)

    def test_a_disk_that_fills_up_is_reported(self, model: Repository) -> None:
        def full(file: RepoFile, done: int) -> None:
            if done:
                raise OSError(28, os.strerror(28))

        with pytest.raises(HubError, match="the disk is full"):
            fetch(plan(NAME), full)


def remote(*paths: str) -> list[RepoFile]:
    return [RepoFile(path=path, size=number + 1, oid=git_name(path.encode())) for number, path in enumerate(paths)]


def chosen(*paths: str, **arguments: object) -> set[str]:
    return {file.path for file in select_files("me/x", remote(*paths), **arguments)}  # type: ignore[arg-type]


class TestChoice:
    def test_only_one_copy_of_the_weights_is_fetched(self) -> None:
        assert chosen("model.safetensors", "model-00001-of-00001.safetensors", "consolidated.safetensors") == {
            "model.safetensors"
        }
        assert chosen("model-00001-of-00001.safetensors", "consolidated.safetensors") == {
            "model-00001-of-00001.safetensors"
        }
        assert chosen("model.safetensors", "some-Q4_K_M.gguf", "config.json") == {"model.safetensors", "config.json"}

    def test_a_single_gguf_file_is_chosen(self) -> None:
        assert chosen("some-Q8_0.gguf", "mmproj-F16.gguf", "README.md") == {"some-Q8_0.gguf"}

    def test_several_gguf_files_are_listed_with_their_sizes(self) -> None:
        files = [
            RepoFile(path=f"some-{mix}.gguf", size=size, oid="")
            for mix, size in (("Q4_K_M", 16_800_000_000), ("Q8_0", 27_000_000_000))
        ]
        with pytest.raises(HubError, match="2 GGUF files") as caught:
            select_files("me/x", files)
        assert "some-Q4_K_M.gguf (16.8 GB)" in caught.value.hint and "--file" in caught.value.hint
        assert [file.path for file in select_files("me/x", files, file="some-Q8_0.gguf")] == ["some-Q8_0.gguf"]

    @pytest.mark.parametrize("file", ["other.gguf", "config.json", "big-00001-of-00002.gguf"])
    def test_an_unusable_file_name_is_refused(self, file: str) -> None:
        with pytest.raises(RequestError, match="--file"):
            chosen("a.gguf", "b.gguf", "config.json", "big-00001-of-00002.gguf", file=file)

    def test_include_and_exclude_select_files(self) -> None:
        files = ("model.safetensors", "config.json", "README.md", "onnx/m.onnx", "extra/a.json")
        assert chosen(*files, include=["*.json"]) == {"config.json", "extra/a.json"}
        assert chosen(*files, include=["extra/", "README.md"]) == {"extra/a.json", "README.md"}
        assert chosen(*files, exclude=["*.safetensors"]) == {"config.json"}
        assert chosen(*files, include=["*"]) == set(files) - {"onnx/m.onnx"}, "a pickle or a copy is never taken"
        with pytest.raises(HubError, match=r"--include \*\.txt leaves no file"):
            chosen(*files, include=["*.txt"])
        with pytest.raises(RequestError, match="--include is given with --file"):
            chosen("a.gguf", include=["*"], file="a.gguf")

    def test_a_repository_without_our_weights_is_refused(self) -> None:
        with pytest.raises(HubError, match="no weights") as caught:
            chosen("pytorch_model.bin", "config.json")
        assert "pytorch_model.bin" in caught.value.hint

    def test_file_names_never_lead_outside(self) -> None:
        with pytest.raises(HubError, match="outside"):
            chosen("model.safetensors", "../../config.json", include=["*"])


@pytest.mark.parametrize(
    "text",
    [
        "a", "a/b/c", "a//b", "../a", "a/..", "a/b@", "a/b@../x", "a/b/../c.gguf", "-a/b", "a--b/c", "a/b c", "",
        "a/" + "b" * 95, "a/b@" + "c" * 300, "a/b/" + "c" * 300 + ".gguf", "a/\u0663",
    ],
)  # fmt: skip
def test_invalid_hub_names_are_refused(text: str) -> None:
    assert HubName.parse(text) is None


def test_resolving_never_connects(hub: Hub) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve("me/some-model@v1")
    assert "blockpress pull me/some-model --revision v1" in caught.value.hint
    assert hub.requests == []


class TestRemoved:
    def test_removing_frees_the_library_s_shared_store(self, hub: Hub, model: Repository) -> None:
        """The faster protocol keeps files once for all repositories, under `blobs/` of the whole cache."""
        store = pytest.importorskip("huggingface_hub.utils._shared_blobs", reason="older libraries have no such store")
        pull()
        (blob,) = (file for name, file in blobs().items() if name == model.etag(shard_of(model)))
        size = blob.stat().st_size
        assert store.publish_blob_to_shared_store(
            blob_path=str(blob), xet_hash="ab" * 32, cache_dir=str(cached.cache_directory()), expected_size=size
        )
        assert blob.is_symlink()
        stored = blob.resolve()
        whole = sum(file.stat().st_size for file in blobs().values())
        assert cached.bytes_of(NAME.repo) == cached.remove(NAME.repo) == whole
        assert not stored.exists() and not cached.home_of(NAME.repo).exists()

    def test_copies_of_the_repository_with_the_same_commit_stay(self, hub: Hub, model: Repository) -> None:
        copies = [HubName(repo=f"you/copy-{number}") for number in range(4)]
        for name in (NAME, *copies):
            hub.repositories[name.repo] = model
            pull(name)
        cached.remove(NAME.repo, model.commit)
        assert not cached.home_of(NAME.repo).exists()
        assert all(resolve(copy.repo).is_dir() for copy in copies)

    def test_missing_permissions_are_reported(self, model: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
        pull()

        def denied(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(shutil, "rmtree", denied)
        with pytest.raises(CheckpointError, match="cannot be removed") as caught:
            cached.remove(NAME.repo)
        assert "rights" in caught.value.hint and resolve(NAME.repo).is_dir()

    def test_leftovers_without_a_snapshot_are_counted_and_removed(self, hub: Hub, model: Repository) -> None:
        hub.cut = {path: [1_000 if path == "config.json" else 0] + [0] * 20 for path in model.files}
        model.files = {"config.json": b" " * 2_000, "model.safetensors": b"s" * 3_000}
        refused()
        assert cached.remove(NAME.repo) == 1_000 and not cached.home_of(NAME.repo).exists()
