"""How deep a schema or a grammar nests, at most. Pure.

The library compiles by recursion, and where its stack ends, so does the daemon: with the 8 MiB of a thread, 2,000 to 3,000
definitions in a chain are one too many (measured 2026-11: `$ref`s to `$ref`s, to arrays, in `allOf`, Lark rules). So what
may nest deeper than `MAX_NESTING` is refused before the library sees it. Both bounds are of what is possible, not of what
is: each definition counted once, as if all stood in one chain.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_NESTING = 1000

_LARK_NESTS = re.compile(r"[:(\[{]")


def schema_nesting(schema: str) -> int:
    """Levels of the schema, and those of everything that a `$ref` in it may lead to."""
    root = json.loads(schema)
    references: set[str] = set()
    levels = _levels(root, references)
    seen: set[str] = set()
    while references:
        reference = references.pop()
        if reference in seen:
            continue
        seen.add(reference)
        levels += 1 + _levels(_target(root, reference), references)
    return levels


def lark_nesting(grammar: str) -> int:
    """Definitions, and whatever opens a group in one."""
    return len(_LARK_NESTS.findall(grammar))


def _levels(value: Any, references: set[str]) -> int:
    """Levels of containers; the references found are added. Without recursion."""
    levels, layer = 0, [value]
    while layer:
        below: list[Any] = []
        for node in layer:
            if isinstance(node, dict):
                below += node.values()
                for key in ("$ref", "$dynamicRef"):
                    if isinstance(reference := node.get(key), str):
                        references.add(reference)
            elif isinstance(node, list):
                below += node
        levels += any(isinstance(node, dict | list) for node in layer)
        layer = below
    return levels


def _target(root: Any, reference: str) -> Any:
    """What a reference names; the whole schema if it is no pointer into it."""
    if not reference.startswith("#/"):
        return root
    node = root
    for step in reference[2:].split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and name in node:
            node = node[name]
        elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        else:
            return root
    return node
