"""Chat bodies as frameworks make them, read from their sources in November 2026."""

import json

SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
MODEL = "smollm2-135m-instruct"

# ChatOpenAI: a call's arguments are written anew by `json.dumps`, its text is null, results lose their extra fields.
LANGCHAIN = {
    "messages": [
        {"content": "Be brief.", "role": "system"},
        {"content": "List.", "role": "user"},
        {
            "content": None,
            "role": "assistant",
            "tool_calls": [
                {
                    "type": "function",
                    "id": "call_1",
                    "function": {
                        "name": "ls",
                        "arguments": json.dumps({"path": "é"}, ensure_ascii=False),
                    },
                }
            ],
        },
        {"content": "a.txt", "role": "tool", "tool_call_id": "call_1"},
    ],
    "model": MODEL,
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.0,
    "max_completion_tokens": 100,
    "n": 1,
    "parallel_tool_calls": False,
    "tool_choice": {"type": "function", "function": {"name": "ls"}},
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "ls",
                "description": "List.",
                "parameters": SCHEMA,
                "strict": True,
            },
        }
    ],
}

# Vercel AI SDK, openai-compatible: an empty text stands beside calls, arguments are written anew by `JSON.stringify`.
VERCEL = {
    "model": MODEL,
    "user": "u",
    "max_tokens": 50,
    "temperature": 0,
    "stop": ["END"],
    "reasoning_effort": "low",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "List."}]},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Which?",
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "ls", "arguments": '{"path":"é"}'},
                    "extra_content": {"google": {"thought_signature": "x"}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": '{"files":[]}'},
    ],
    "tools": [
        {
            "type": "function",
            "function": {"name": "ls", "description": "List.", "parameters": SCHEMA},
        }
    ],
    "tool_choice": "auto",
    "stream": True,
    "stream_options": {"include_usage": True},
}
