"""`blockpress launch`: the settings with which a client talks to `blockpress serve`.

Invariant: nothing is written but by `--write`, and a file that is there is never overwritten.
Run it:  blockpress launch claude
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from blockpress.errors import RequestError

Client = Annotated[
    str, typer.Argument(metavar="CLIENT", help="claude, codex, opencode, continue, open-webui, aider or openai.")
]


def launch(
    client: Client,
    url: Annotated[str, typer.Option(metavar="URL", help="Where the server listens.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(metavar="NAME", help="What the server calls its model.")] = "sudoku-nano",
    api_key: Annotated[str, typer.Option(metavar="KEY", help="The server's key, if it asks for one.")] = "none",
    write: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the settings into this new file.")] = None,
) -> None:
    """Print the settings with which a client talks to a server, or write them into a file.

    \b
    Examples:
      eval "$(blockpress launch claude)" && claude
      blockpress launch codex --write ~/.codex/config.toml
    """
    text = settings(client, url.rstrip("/"), model, api_key)
    if write is None:
        print(text)
        return
    file = write.expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text + "\n")
    except FileExistsError:
        raise RequestError(f"--write is {str(write)!r}, which exists", hint="merge the settings by hand") from None


def settings(client: str, url: str, model: str, key: str) -> str:
    """The settings of a client. Raises RequestError: one that is not known."""
    known = {
        "claude": _exports(ANTHROPIC_BASE_URL=url, ANTHROPIC_AUTH_TOKEN=key, ANTHROPIC_MODEL=model),
        "openai": _exports(OPENAI_BASE_URL=f"{url}/v1", OPENAI_API_KEY=key),
        "aider": _exports(OPENAI_API_BASE=f"{url}/v1", OPENAI_API_KEY=key, AIDER_MODEL=f"openai/{model}"),
        "open-webui": _exports(OPENAI_API_BASE_URL=f"{url}/v1", OPENAI_API_KEY=key, OLLAMA_BASE_URL=url),
        "codex": "\n".join(
            [
                f"model = {json.dumps(model)}",
                'model_provider = "blockpress"',
                "",
                "[model_providers.blockpress]",
                'name = "blockpress"',
                f"base_url = {json.dumps(url + '/v1')}",
                'wire_api = "responses"',
                f"http_headers = {{ Authorization = {json.dumps('Bearer ' + key)} }}",
            ]
        ),
        "opencode": _json(
            {
                "$schema": "https://opencode.ai/config.json",
                "provider": {
                    "blockpress": {
                        "npm": "@ai-sdk/openai-compatible",
                        "name": "blockpress",
                        "options": {"baseURL": f"{url}/v1", "apiKey": key},
                        "models": {model: {"name": model}},
                    }
                },
                "model": f"blockpress/{model}",
            }
        ),
        "continue": "\n".join(
            [
                "name: blockpress",
                "version: 0.0.1",
                "schema: v1",
                "models:",
                f"  - name: {json.dumps(model)}",
                "    provider: openai",
                f"    model: {json.dumps(model)}",
                f"    apiBase: {json.dumps(url + '/v1')}",
                f"    apiKey: {json.dumps(key)}",
                "    roles: [chat, edit, apply, autocomplete]",
            ]
        ),
    }
    if client not in known:
        raise RequestError(f"CLIENT is {client!r}", hint=f"one of {', '.join(sorted(known))}")
    return known[client]


def _exports(**values: str) -> str:
    return "\n".join(f"export {name}='{_quoted(value)}'" for name, value in values.items())


def _quoted(value: str) -> str:
    return value.replace("'", "'\\''")


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
