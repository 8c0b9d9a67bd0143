"""A chain of definitions would end the daemon, so it is refused; what real schemas have is not."""

import json

import pytest

from engine.constraint import ConstraintRefused, Exactly, InTurn, Json, Lark
from engine.nesting import MAX_NESTING, schema_nesting
from tests.fakes import byte_grammars


def chain(count, link):
    """A schema of so many definitions, each of which leads to the next."""
    definitions = {f"d/{n}": link(f"#/$defs/d~1{n + 1}") for n in range(count)}
    definitions[f"d/{count}"] = {"type": "null"}
    return json.dumps({"$defs": definitions, "$ref": "#/$defs/d~10"})


LINKS = {
    "refs": lambda ref: {"$ref": ref},
    "arrays": lambda ref: {"type": "array", "items": {"$ref": ref}},
    "all of": lambda ref: {"allOf": [{"$ref": ref}, {"maxLength": 9}]},
    "any of": lambda ref: {"anyOf": [{"$ref": ref}, {"type": "array", "items": {"$ref": ref}}]},
    "properties": lambda ref: {"type": "object", "properties": {"a": {"$ref": ref}}},
}


@pytest.mark.parametrize("link", LINKS)
def test_the_longest_chain_that_is_allowed_compiles_and_no_longer_one(link):
    """If this test dies, the bound is too high."""
    each = schema_nesting(chain(11, LINKS[link])) - schema_nesting(chain(10, LINKS[link]))
    longest = (MAX_NESTING - 10) // each
    grammars = byte_grammars()
    grammars.compile(Json(chain(longest, LINKS[link])))
    with pytest.raises(ConstraintRefused, match="nests") as caught:
        grammars.compile(InTurn((Exactly("a"), Json(chain(MAX_NESTING + 1, LINKS[link]), "here"))))
    assert caught.value.at == "here"


@pytest.mark.parametrize("start", ['r{}: r{} | "b"\n', 'R{}: R{} "b"\n', "r{}: (r{})?\n"])
def test_the_longest_grammar_that_is_allowed_compiles_and_no_longer_one(start):
    def grammar(rules):
        name = start[0]
        links = "".join(start.format(n, n + 1) for n in range(rules))
        return f'start: {name}0\n{links}{name}{rules}: "a"\n'

    longest = (MAX_NESTING - 2) // (1 + start.count("("))
    byte_grammars().compile(Lark(grammar(longest)))
    with pytest.raises(ConstraintRefused, match="nests"):
        byte_grammars().compile(Lark(grammar(MAX_NESTING + 1), "here"))


def test_levels_are_counted_once_for_each_definition():
    leaf = {"type": "string"}
    assert schema_nesting(json.dumps(leaf)) == 1
    assert schema_nesting(json.dumps({"items": {"enum": [1]}})) == 3
    assert schema_nesting('{"enum": []}') == 2
    tree = {"$defs": {"n": {"items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}
    assert schema_nesting(json.dumps(tree)) == 4 + 1 + 2
    twice = {"$defs": {"n": leaf}, "anyOf": [{"$ref": "#/$defs/n"}, {"$ref": "#/$defs/n"}]}
    assert schema_nesting(json.dumps(twice)) == 3 + 1 + 1
    # what is no pointer into the schema may lead anywhere in it
    for reference in ("#", "#name", "#/nowhere", "#/anyOf/7", "other.json"):
        assert schema_nesting(json.dumps({"anyOf": [{"$ref": reference}]})) == 3 + 1 + 3
    assert schema_nesting(json.dumps({"anyOf": [leaf, {"$ref": "#/anyOf/0"}]})) == 3 + 1 + 1
