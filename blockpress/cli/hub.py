"""`blockpress pull`, `ls` and `rm`: models from the hub in the cache that other tools share.

Invariant: nothing is removed that was not named, and nothing outside the cache; nothing is fetched but by `pull`, and
by a command that offers it and is told yes.

Run it:  blockpress ls
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeVar

import typer

from blockpress.cli import options, terminal
from blockpress.cli.progress import byte_bars
from blockpress.cli.units import format_age, format_bytes
from blockpress.errors import CheckpointError, HubError, ModelNotFound, RequestError

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

    from blockpress.checkpoints.hub.cache import HubName
    from blockpress.checkpoints.hub.download import Plan

Opened = TypeVar("Opened")

Name = Annotated[str, typer.Argument(metavar="NAME", help="A model on the hub, as owner/name.")]
Patterns = list[str]


def pull(
    name: Name,
    revision: Annotated[
        str | None, typer.Option(metavar="R", help="A branch, a tag or a commit. Default: main.")
    ] = None,
    file: Annotated[
        str | None, typer.Option(metavar="X.gguf", help="The GGUF file to fetch, where there are several.")
    ] = None,
    include: Annotated[
        Patterns | None, typer.Option(metavar="PATTERN", help="Fetch these files only, e.g. '*.json'. Repeatable.")
    ] = None,
    exclude: Annotated[
        Patterns | None, typer.Option(metavar="PATTERN", help="Leave these files out. Repeatable.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Fetch a model from the hub, or go on with a download that was cut.

    Only what a model needs is fetched: its weights once, config, tokenizer and chat template. Every file is compared
    with the hub's checksum. HF_HOME says where files are kept, HF_TOKEN who you are, HF_HUB_OFFLINE=1 forbids to fetch.

    \b
    Examples:
      blockpress pull google/diffusiongemma-26B-A4B-it
      blockpress pull someone/diffusiongemma-GGUF --file diffusiongemma-Q4_K_M.gguf
    """
    from huggingface_hub import is_offline_mode

    from blockpress.checkpoints.hub import download as hub

    wanted = _named(name, revision)
    if file is not None and wanted.file is not None:
        raise RequestError(f"--file is given with {name!r}", hint="leave out --file, or the file in NAME")
    file = file or wanted.file
    if is_offline_mode():
        options.refuse("HF_HUB_OFFLINE", {"--include": include or None, "--exclude": exclude or None})
        path = _already_there(name, wanted, file)
        _say_pulled(name, path, 0, 0, json)
        return
    with terminal.waiting(f"asking for {wanted.repo}"):
        plan = hub.plan(wanted, include=include or (), exclude=exclude or (), file=file)
    hub.check_room(plan)
    coming = plan.bytes_left
    _fetch(plan)
    path = plan.path if file is None else plan.path / file
    _say_pulled(name, path, len(plan.left), coming, json)


def opened_or_pulled(open: Callable[[], Opened], name: str, yes: bool) -> Opened:
    """What `open` makes of the model of that name. One of the hub that this machine lacks is pulled first, where `yes`
    or somebody on a terminal, who is told what it takes, agrees.

    Raises:
        ModelNotFound, CheckpointError: it is not here, and there is nobody to ask, or the answer is no.
        HubError: the hub does not have it, or it cannot be fetched.
    """
    from blockpress.checkpoints.hub.cache import HubName

    try:
        return open()
    except CheckpointError as error:
        wanted = HubName.parse(name)
        if wanted is None or "blockpress pull" not in error.hint:
            raise
        _offer(name, wanted, error, yes)
    return open()


def _offer(name: str, wanted: HubName, missing: CheckpointError, yes: bool) -> None:
    from huggingface_hub import is_offline_mode

    from blockpress.checkpoints.hub import download as hub

    if is_offline_mode():
        raise missing
    if not yes and not (terminal.is_terminal(sys.stdin) and terminal.is_terminal(sys.stderr)):
        raise type(missing)(missing.message, hint=f"{missing.hint}; or give --yes")
    try:
        with terminal.waiting(f"asking for {wanted.repo}"):
            plan = hub.plan(wanted, file=wanted.file)
    except HubError as error:  # it may have been the path of a directory
        raise HubError(f"{missing.message}; {error.message}", hint=error.hint) from error
    hub.check_room(plan)
    if not yes:
        (place, free), files = hub.disk_room(), f"{len(plan.left)} file{'s' * (len(plan.left) != 1)}"
        terminal.note(
            f"{name} is not whole on this machine: {files}, {format_bytes(plan.bytes_left)} to fetch; "
            f"{format_bytes(free)} are free on the disk of {place}; {_fits(plan)[1]}"
        )
        if not _agreed("Pull it?", sys.stderr):
            raise type(missing)(missing.message, hint=missing.hint)
    _fetch(plan)


def ls(json: options.Json = False) -> None:
    """List the models of this machine: those that come with blockpress, and those in the hub's cache.

    The cache may hold other models; those that blockpress cannot run are not listed.

    \b
    Examples:
      blockpress ls
      blockpress ls --json
    """
    from blockpress.checkpoints import shipped
    from blockpress.checkpoints.hub.cache import cache_directory, list_cached
    from blockpress.checkpoints.identify import identify

    rows: list[dict[str, Any]] = []
    for name, path in shipped().items():
        on_disk = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        rows += [_row(name, path, asdict(identify(path)), on_disk, source="shipped")]
    for entry in list_cached():
        rows += [
            _row(entry.name, entry.path, asdict(entry.kind), entry.bytes, source="cache")
            | {"revision": entry.revision, "refs": list(entry.refs), "last_used": entry.last_used}
            | {"missing": entry.missing}
        ]
    if json:
        options.print_json({"cache": str(cache_directory()), "models": rows})
    else:
        print("\n".join(_table(rows)))


def rm(
    name: Name,
    revision: Annotated[
        str | None, typer.Option(metavar="R", help="A branch, a tag or a commit, or its first digits. Default: all.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: options.Json = False,
) -> None:
    """Remove a model from the hub's cache.

    Other tools that use the cache lose it, too. Models that come with blockpress and plain directories are not touched.

    \b
    Examples:
      blockpress rm google/diffusiongemma-26B-A4B-it
      blockpress rm google/diffusiongemma-26B-A4B-it --revision 3f1a2b4 --yes
    """
    from blockpress.checkpoints.hub import cache as cached

    _refuse_elsewhere(name)
    wanted = _named(name, revision)
    if wanted.file is not None:
        raise RequestError(f"NAME is {name!r}, one file of a model", hint=f"give {wanted.repo}: it goes as a whole")
    commit = None if revision is None and "@" not in name else cached.commit_of(wanted.repo, wanted.revision)
    if not cached.home_of(wanted.repo).is_dir():
        raise ModelNotFound(f"the cache does not hold {wanted.repo}", hint="`blockpress ls` lists what it holds")
    if commit is None and (revision is not None or "@" in name):
        held = sorted(entry.name[:12] for entry in (cached.home_of(wanted.repo) / "snapshots").glob("*"))
        raise ModelNotFound(
            f"the cache does not hold revision {wanted.revision!r} of {wanted.repo}",
            hint=f"it holds {', '.join(held) or 'none'}",
        )
    what = wanted.repo + ("" if commit is None else f" at {commit[:12]}")
    if not yes:
        _ask(f"Remove {what} from the cache? This frees {format_bytes(cached.bytes_of(wanted.repo, commit))}.")
    with _quiet_library():
        freed = cached.remove(wanted.repo, commit)
    if json:
        options.print_json({"removed": wanted.repo, "revision": commit, "freed": freed})
    else:
        print(f"removed {what}: {format_bytes(freed)} freed")


def _named(name: str, revision: str | None) -> HubName:
    """Raises RequestError: no name on the hub, or two revisions."""
    from blockpress.checkpoints.hub.cache import HubName

    if revision is not None and "@" in name:
        raise RequestError(f"--revision is given with {name!r}", hint="leave out --revision or what follows the @")
    wanted = HubName.parse(name if revision is None else f"{name}@{revision}")
    if wanted is None and revision is not None and HubName.parse(name) is not None:
        raise RequestError(f"--revision is {revision!r}", hint="give a branch, a tag or a commit")
    if wanted is None:
        raise RequestError(
            f"NAME is {name!r}, no name on the hub", hint="give owner/name, e.g. google/diffusiongemma-26B-A4B-it"
        )
    return wanted


def _already_there(name: str, wanted: HubName, file: str | None) -> Path:
    """What the cache holds of a model while no connection is allowed.

    Raises:
        HubError: it lacks something.
    """
    from blockpress.checkpoints import resolve

    revision = "" if wanted.revision == "main" else f"@{wanted.revision}"
    try:
        return resolve(f"{wanted.repo}{'' if file is None else '/' + file}{revision}")
    except ModelNotFound as error:
        raise HubError(f"{name} is not in the cache", hint="unset HF_HUB_OFFLINE to fetch it") from error
    except CheckpointError as error:
        raise HubError(error.message, hint="unset HF_HUB_OFFLINE to fetch the rest") from error


def _fits(plan: Plan) -> tuple[bool, str]:
    """Whether the weights fit into the memory that is free now, and this in words."""
    from blockpress.hardware import free_memory

    weights = sum(file.size for file in plan.files if file.path.endswith((".safetensors", ".gguf")))
    device, free = max(free_memory().items(), key=lambda item: item[1])
    fits = weights <= free
    return fits, (
        f"the weights take {format_bytes(weights)}, and this machine has {format_bytes(free)} free on {device}: "
        + ("they fit" if fits else "it will not run here as it is")
    )


def _fetch(plan: Plan) -> None:
    """Fetch what is left, with bars; a model that will not fit into memory is one all the same, and said to be."""
    from blockpress.checkpoints.hub import download as hub

    fits, words = _fits(plan)
    if not fits:
        terminal.note(f"blockpress: {words}")
    with _quiet_library(), _bars(plan) as progress:
        hub.fetch(plan, progress)


def _say_pulled(name: str, path: Path, files: int, count: int, json: bool) -> None:
    from blockpress.checkpoints.hub.cache import missing

    lacks = None if path.is_file() else missing(path)
    if json:
        said = {"model": name, "path": str(path), "files_fetched": files, "bytes_fetched": count, "missing": lacks}
        options.print_json(said)
        return
    done = f"{files} file{'s' * (files != 1)} fetched, {format_bytes(count)}" if files else "already there"
    print(f"{name}: {done}; {path}" + (f"\nnot a whole model yet: {lacks}" if lacks else ""))


@contextmanager
def _bars(plan: Plan) -> Iterator[Callable[[RepoFile, int], None]]:
    """A bar a file on a terminal, and one line a file otherwise; both on stderr."""
    if not terminal.is_terminal(sys.stderr):
        yield lambda file, done: terminal.note(f"{file.path}  {format_bytes(file.size)}") if done == file.size else None
        return
    with byte_bars() as bars:
        tasks = {file.path: bars.add_task(file.path, total=file.size, start=False) for file in plan.left}

        def report(file: RepoFile, done: int) -> None:
            bars.start_task(tasks[file.path])
            bars.update(tasks[file.path], completed=done)

        yield report


@contextmanager
def _quiet_library() -> Iterator[None]:
    """The library's own warnings would tear the bars; what matters of them comes back as an error."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _row(name: str, path: Path, kind: dict[str, Any], count: int, *, source: str) -> dict[str, Any]:
    return {"name": name, "source": source, "path": str(path), **kind, "bytes": count} | {
        "revision": None, "refs": [], "last_used": None, "missing": None
    }  # fmt: skip


def _table(rows: list[dict[str, Any]]) -> list[str]:
    cells = [("NAME", "FORMAT", "SIZE", "REVISION", "LAST USED")]
    for row in rows:
        revision = row["source"] if row["revision"] is None else row["revision"][:12]
        revision += f" ({', '.join(row['refs'])})" if row["refs"] else ""
        used = "" if row["last_used"] is None else format_age(time.time() - row["last_used"])
        partial = f"   partial: {row['missing']}" if row["missing"] else ""
        cells += [(row["name"], row["format"], format_bytes(row["bytes"]), revision, used + partial)]
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _refuse_elsewhere(name: str) -> None:
    """Raises RequestError: a shipped model, or a path."""
    from blockpress.checkpoints import shipped

    if name in shipped():
        raise RequestError(f"{name} comes with blockpress", hint="rm removes models of the hub's cache only")
    # Not Path's own methods: they raise for a name that no file can have, and for a home that nobody has.
    if os.path.exists(os.path.expanduser(name)) and (name.startswith(("/", ".", "~")) or "/" not in name):
        raise RequestError(f"{name!r} is a path", hint="rm removes models of the hub's cache only; remove it yourself")


def _ask(question: str) -> None:
    """Raises RequestError: nobody to ask, or the answer is no."""
    if not terminal.is_terminal(sys.stdin):
        raise RequestError(f"{question} There is nobody to ask", hint="give --yes")
    if not _agreed(question, sys.stdout):
        raise RequestError("nothing was removed", hint="answer y to remove it")


def _agreed(question: str, stream: TextIO) -> bool:
    print(f"{question} [y/N] ", end="", file=stream, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
