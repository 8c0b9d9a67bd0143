"""Every command and option explains itself, and what the explanations show can be typed."""

import argparse
import shlex

import pytest

from broker.__main__ import main
from broker.commands.tree import make_parser


def commands(parser=None, path=("homeport",)):
    """Every parser of the tree with the words that lead to it."""
    parser = parser or make_parser()
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from commands(below, (*path, name))


TREE = dict(commands())
NAMES = [" ".join(path) for path in TREE]


def options(parser):
    return [
        action
        for action in parser._actions
        if not isinstance(action, argparse._SubParsersAction | argparse._HelpAction)
    ]


@pytest.mark.parametrize("path", TREE, ids=NAMES)
def test_every_option_has_help_that_says_its_default(path):
    for action in options(TREE[path]):
        name = action.option_strings or action.dest
        said = action.help or ""
        assert said.replace("(%(default)s)", "").strip(), name
        if action.default not in (None, False, [], argparse.SUPPRESS):
            assert "%(default)s" in said or "(all)" in said, name


@pytest.mark.parametrize("path", TREE, ids=NAMES)
def test_help_has_a_description_examples_and_statuses_and_fits_a_terminal(path, capsys):
    with pytest.raises(SystemExit) as left:
        main([*path[1:], "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert len(TREE[path].description) > 40
    assert "\nexamples:\n" in said
    assert "\nexit status:\n  0 " in said
    assert max(map(len, TREE[path].description.splitlines())) <= 80


def examples():
    for path, parser in TREE.items():
        for line in parser.epilog.splitlines():
            if line.startswith("  homeport "):
                yield path, line.strip()


EXAMPLES = list(examples())


@pytest.mark.parametrize(("path", "line"), EXAMPLES, ids=[line for _, line in EXAMPLES])
def test_every_example_parses_and_is_about_its_command(path, line):
    words = shlex.shlex(line, posix=True, punctuation_chars="|>;")
    words.whitespace_split = True
    argv = []
    for word in words:
        if word in ("|", ">", ";"):
            break
        argv.append(word)
    assert tuple(argv[: len(path)]) == path
    arguments = make_parser().parse_args(argv[1:])
    assert callable(arguments.run)


def test_every_example_of_every_page_is_seen_by_these_tests():
    for path, parser in TREE.items():
        lines = [line for line in parser.epilog.splitlines() if line.startswith("  # ")]
        assert len(lines) == sum(owner == path for owner, _ in EXAMPLES) > 0


def test_the_version_is_the_distributions(capsys):
    from importlib.metadata import version

    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"homeport {version('homeport')}\n"
