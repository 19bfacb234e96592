"""Real clients, each in an environment of its own, against the server: a table of client by feature.

    make clients        (or: python -m tests.clients.run [CLIENT ...])

Each client is a script here that prints a line of JSON for each feature. It is given the address of a server with a model
that does what it is told (`tests.builders.chats.Obedient`), of `blockpress serve` with the shipped model, and of a random
chat checkpoint, which fills holes and decides. Environments are made once, under build/clients, from PyPI and npm.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import blockpress
from tests.builders.chats import obedient_model, save_seeing
from tests.builders.server import serving

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "clients"
PYTHON = {
    "openai_python.py": ("openai", "openai==3.57.0"),
    "anthropic_python.py": ("anthropic", "anthropic==2.14.0"),
    "ollama_python.py": ("ollama", "ollama==0.6.3"),
    "litellm_python.py": ("litellm", "litellm"),
    "langchain_python.py": ("langchain", "langchain-openai"),
    "typesafe_python.py": ("typesafe", "typesafe-sdk"),
    "open_responses_python.py": ("openresponses", "openresponses-types httpx"),
}
"""Scripts in Python: their environment, and what is installed in it."""
NODE = ("openai_node.mjs", "anthropic_node.mjs", "ollama_node.mjs", "ai_node.mjs")
PACKAGES = ("openai", "@anthropic-ai/sdk", "ollama", "ai", "@ai-sdk/openai-compatible", "@ai-sdk/anthropic", "zod")
FEATURES = (
    "chat",
    "turns",
    "stream",
    "tools",
    "thinking",
    "schema",
    "stop",
    "usage",
    "responses",
    "suffix",
    "decisions",
    "error",
    "cancel",
    "sudoku-nano",
)


def python_of(name: str, package: str, *, shared: bool = False) -> Path:
    """The interpreter of a client's environment, which is made if need be. shared: it has our packages, torch too."""
    python = BUILD / name / "bin" / "python"
    if not python.exists():
        print(f"making {BUILD / name}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(BUILD / name)], check=True)
        if shared:
            own = sysconfig.get_path("purelib", vars={"base": str(BUILD / name)})
            Path(own, "shared.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *package.split()], check=True)
    return python


def node_scripts() -> Path | None:
    """Where the scripts of Node lie beside their packages; None without Node."""
    if shutil.which("npm") is None:
        return None
    folder = BUILD / "node"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "node_modules").exists():
        print(f"making {folder}", file=sys.stderr)
        (folder / "package.json").write_text('{"private": true}', encoding="utf-8")
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", *PACKAGES], cwd=folder, check=True)
    for script in HERE.glob("*.mjs"):
        shutil.copy(script, folder)
    return folder


@contextmanager
def shipped() -> Iterator[str]:
    """`blockpress serve` as people start it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "blockpress", "serve", "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except OSError:
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def asked(command: list[str], where: Path, addresses: dict[str, str]) -> dict[str, str]:
    """What a script says of each feature: "yes", or what went wrong."""
    environment = {**os.environ, **addresses, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=300)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"feature"')]
    if not said:
        return {"chat": " ".join(done.stderr.split())[-200:] or "nothing was said"}
    return {each["feature"]: each["result"] for each in said}


def main() -> int:
    """Print the table; the status is 1 if a feature that a client has does not work."""
    torch.set_num_threads(1)
    chosen = set(sys.argv[1:])
    rows: dict[str, dict[str, str]] = {}
    save_seeing(BUILD / "random")
    with (
        serving(obedient_model(), "chatty", reference=True) as chatty,
        serving(blockpress.load(BUILD / "random"), "random") as drawn,
        shipped() as nano,
    ):
        addresses = {"CHATTY": chatty.url, "NANO": nano, "RANDOM": drawn.url}
        for script, (name, package) in PYTHON.items():
            if not chosen or script in chosen:
                rows[script] = asked([str(python_of(name, package)), str(HERE / script)], HERE, addresses)
        folder = node_scripts()
        for script in NODE if folder is not None else ():
            if not chosen or script in chosen:
                rows[script] = asked(["node", script], folder or HERE, addresses)
    print("| client | " + " | ".join(FEATURES) + " |\n|" + "---|" * (len(FEATURES) + 1))
    for script, results in rows.items():
        cells = ("yes" if results.get(f) == "yes" else "**no**" if f in results else "" for f in FEATURES)
        print(f"| {script} | " + " | ".join(cells) + " |")
    wrong = [(s, f, result) for s, results in rows.items() for f, result in results.items() if result != "yes"]
    for script, feature, result in wrong:
        print(f"{script}, {feature}: {result}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
