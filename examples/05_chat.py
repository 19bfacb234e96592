"""A conversation with a tool: the model calls it, we answer, it continues. Needs a checkpoint with a chat template.

python examples/05_chat.py google/diffusiongemma-26B-A4B-it "What is the time in Paris?"
"""

import sys
from datetime import datetime
from zoneinfo import ZoneInfo

import blockpress

CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time in a zone, such as Europe/Paris.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]},
    },
}


def clock(zone: str) -> str:
    return datetime.now(ZoneInfo(zone)).strftime("%H:%M")


lm = blockpress.load(sys.argv[1])
messages = [{"role": "user", "content": sys.argv[2]}]
for _ in range(4):  # our question, then at most three rounds of calls
    reply = lm.chat(messages, tools=[CLOCK], thinking=True, thinking_budget=400, max_tokens=800)
    messages.append(reply.message)
    if reply.finish_reason != "tool_calls":
        break
    for call in reply.tool_calls:
        try:
            content = clock(**call.arguments)
        except (KeyError, TypeError, ValueError) as error:  # a model may pass wrong arguments
            content = f"error: {error}"
        messages.append({"role": "tool", "name": call.name, "content": content})

print(f"thought for {reply.usage.reasoning_tokens} tokens, {reply.usage.steps} steps in all")
print(reply.text)
