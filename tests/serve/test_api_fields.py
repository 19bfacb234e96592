"""Every field of the dialects' bodies is sent, and what happens is what docs/apis.md says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from ollama._types import ChatRequest, GenerateRequest, Options
from openai.types.responses import response_create_params

from tests.builders.server import Served

PAGE = Path(__file__).parents[2] / "docs" / "apis.md"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FUNCTION = {"name": "f", "parameters": SCHEMA}
HI = [{"role": "user", "content": "say 4"}]

ANTHROPIC: dict[str, Any] = {
    "model": "chatty",
    "max_tokens": 3,
    "messages": HI,
    "system": [{"type": "text", "text": "Be.", "cache_control": {"type": "ephemeral"}}],
    "stop_sequences": ["x"],
    "stream": True,
    "temperature": 0.5,
    "tools": [
        {"name": "f", "input_schema": SCHEMA, "type": "custom", "defer_loading": False, "input_examples": [{"a": 1}]}
    ],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": False},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": SCHEMA}},
    "output_format": {"type": "json_schema", "schema": SCHEMA},
    "top_k": 5,
    "top_p": 0.9,
    "compaction": {"type": "auto"},
    "container": "container_1",
    "mcp_servers": [{"type": "url", "name": "a", "url": "https://a.example"}],
    "thread": {"type": "continue"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "cache_control": {"type": "ephemeral"},
    "metadata": {"user_id": "u"},
    "service_tier": "auto",
    "inference_geo": "eu",
    "speed": "fast",
    "diagnostics": {"previous_message_id": None},
    "billing_policy": {"type": "a"},
    "fallback_credit_token": "a",
    "fallbacks": [{"model": "a"}],
    "user_profile_id": "a",
    "workspace_id": "a",
    "betas": ["a"],
}
RESPONSES: dict[str, Any] = {
    "model": "chatty",
    "input": HI,
    "instructions": "Be.",
    "max_output_tokens": 3,
    "tools": [{"type": "function", "strict": True, "description": None, **FUNCTION}],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "low", "summary": "auto", "generate_summary": None, "context": "auto"},
    "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}, "verbosity": "low"},
    "include": ["reasoning.encrypted_content", "file_search_call.results"],
    "top_logprobs": 2,
    "stream": True,
    "temperature": 0.5,
    "metadata": {"a": "b"},
    "prompt_cache_key": "a",
    "safety_identifier": "a",
    "service_tier": "auto",
    "user": "a",
    "top_p": 0.9,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "background": True,
    "conversation": "conv_1",
    "moderation": {"model": "a"},
    "previous_response_id": "resp_1",
    "prompt": {"id": "a"},
    "truncation": "auto",
    "context_management": [{"type": "compaction"}],
    "store": True,
    "stream_options": {"include_obfuscation": True},
    "max_tool_calls": 2,
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "access_programs": {"cyber": "standard"},
    "background_options": {"completion_window": "2h"},
    "image": {"context_compression": "auto"},
    "client_metadata": {"a": "b"},
}
OLLAMA: dict[str, Any] = {
    "model": "chatty",
    "messages": HI,
    "tools": [{"type": "function", "function": FUNCTION}],
    "prompt": "say 4",
    "system": "Be.",
    "raw": True,
    "format": SCHEMA,
    "think": True,
    "stream": True,
    "logprobs": True,
    "top_logprobs": 2,
    "steps": 5,
    "suffix": "a",
    "template": "a",
    "context": [1],
    "keep_alive": "5m",
    "width": 5,
    "height": 5,
    "images": [],
}
OPTIONS: dict[str, Any] = {
    "temperature": 0.5,
    "seed": 1,
    "num_predict": 3,
    "stop": ["x"],
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.1,
    "tfs_z": 0.5,
    "typical_p": 0.5,
    "mirostat": 1,
    "repeat_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "num_ctx": 4096,
    **dict.fromkeys(("num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "repeat_last_n"), 8),
    **dict.fromkeys(("numa", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mmap", "use_mlock"), True),
    **dict.fromkeys(("embedding_only", "penalize_newline"), False),
    **dict.fromkeys(("mirostat_tau", "mirostat_eta"), 0.1),
}
OLLAMA |= {f"options.{name}": value for name, value in OPTIONS.items()}
EXAMPLES = {"Anthropic": ANTHROPIC, "Responses": RESPONSES, "Ollama": OLLAMA}
GENERATED = ("prompt", "system", "raw", "images", "steps", "suffix", "template", "context", "width", "height")


def rows() -> list[tuple[str, str, str]]:
    """Dialect, field, and what the page says of it."""
    found = []
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        dialect = section.partition("\n")[0]
        for line in section.splitlines():
            if line.startswith("| `"):
                cells = line.split("|")
                found += [(dialect, name, cells[2].strip()) for name in re.findall(r"`([\w.]+)`", cells[1])]
    return found


ROWS = rows()


def sent(served: Served, dialect: str, field: str) -> httpx.Response:
    value = EXAMPLES[dialect][field]
    if dialect == "Anthropic":
        path, body = "v1/messages", {"model": "chatty", "max_tokens": 2000, "messages": HI}
    elif dialect == "Responses":
        path, body = "v1/responses", {"model": "chatty", "input": "say 4"}
    elif field in GENERATED:
        path, body = (
            "api/generate",
            {"model": "chatty", "stream": False, "prompt": "say 4", "options": {"num_predict": 5}},
        )
    else:
        path, body = "api/chat", {"model": "chatty", "stream": False, "messages": HI}
    top, _, option = field.partition(".")
    body[top] = {option: value} if option else value
    return httpx.post(f"{served.url}/{path}", json=body, timeout=30)


@pytest.mark.parametrize(("dialect", "field", "said"), ROWS, ids=lambda value: str(value))
def test_a_field_is_what_the_page_says(chatty: Served, dialect: str, field: str, said: str) -> None:
    answer = sent(chatty, dialect, field)
    if said == "refused":
        told = answer.json()["error"]
        assert answer.status_code == 400 and field in (told if isinstance(told, str) else told["message"])
    else:
        assert said in ("honoured", "no meaning")
        assert answer.status_code == 200, answer.text


def test_the_page_has_every_field_of_the_clients_libraries() -> None:
    # Not at the top: it takes more than a second, and every process of pytest collects all files.
    from anthropic.types import message_create_params
    from anthropic.types.beta import message_create_params as beta_params

    listed = {dialect: {name for kind, name, _ in ROWS if kind == dialect} for dialect in EXAMPLES}
    types: dict[str, list[Any]] = {
        "Anthropic": [message_create_params.MessageCreateParamsBase, beta_params.MessageCreateParamsBase],
        "Responses": [response_create_params.ResponseCreateParamsBase],
    }
    for dialect, kinds in types.items():
        for kind in kinds:
            assert kind.__annotations__.keys() - listed[dialect] == set()
    asked = ChatRequest.model_fields.keys() | GenerateRequest.model_fields.keys()
    options = {f"options.{name}" for name in Options.model_fields}
    assert (asked - {"options"}) - listed["Ollama"] == set() == options - listed["Ollama"]
    assert {dialect: examples.keys() for dialect, examples in EXAMPLES.items()} == listed


@pytest.mark.parametrize("kind", [{}, [], {"a": 1}, 3, None])
@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("v1/chat/completions", "messages"),
        ("v1/messages", "messages"),
        ("v1/responses", "input"),
        ("api/chat", "messages"),
    ],
)
def test_a_part_whose_type_is_no_text_is_refused(chatty: Served, path: str, field: str, kind: Any) -> None:
    body = {"model": "chatty", "max_tokens": 3, field: [{"role": "user", "content": [{"type": kind, "text": "a"}]}]}
    answer = httpx.post(f"{chatty.url}/{path}", json=body, timeout=30)
    assert answer.status_code == 400 and f"{field}[0].content" in answer.text


def test_half_a_character_comes_back_as_it_was_sent(chatty: Served) -> None:
    """A lone surrogate is JSON, and no UTF-8."""
    body = {"model": "chatty", "input": "say 4", "metadata": {"a": "\ud83d"}}
    json_type = {"Content-Type": "application/json"}
    for stream in (False, True):
        sent = json.dumps({**body, "stream": stream})
        answer = httpx.post(f"{chatty.url}/v1/responses", content=sent, headers=json_type, timeout=30)
        assert answer.status_code == 200 and '"a":"\\ud83d"' in answer.text.replace(": ", ":")
