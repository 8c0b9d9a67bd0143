"""What the README and docs/ name exists: keys, options, routes, metrics, files, headings. Nothing is started here.

What is run is in test_as_written.py. Whatever a page does not let it run is listed below with the reason, and nothing else is.
"""

import argparse
import json
import re
import subprocess
from pathlib import Path

import pytest

from broker.admission import AdmissionStatistics
from broker.config import Config, known_keys, load
from broker.metrics import EdgeReport, render
from broker.openapi import OPERATIONS
from engine.api import EngineReport
from tests.clients.__main__ import AGENTS
from tests.docs import pages
from tests.docs.homeport import make_parser as parser
from tests.docs.pages import PAGES, ROOT

KINDS = {
    "sh": {""},
    "python": {""},
    "json": {""},
    "text": {"", "exactly", "log", "usage", "files"},
}  # toml: a file's name

# {page: the reasons that its `<!-- not run: … -->` give}
NOT_RUN = {
    "README.md": [
        "it downloads a gigabyte",
        "each measures or tests for minutes to hours",
    ],
    "docs/claude-code.md": [
        "claude is no Python package; tests/clients runs it with these variables",
    ],
    "docs/codex.md": [
        "codex is no Python package; tests/clients runs it with the two files above",
    ],
    "docs/models.md": ["it downloads a gigabyte"],
    "docs/sdks.md": [
        "langchain-openai is not among the development tools, for it brings forty packages; run by hand",
    ],
    "docs/upgrade.md": ["it changes the checkout that it runs from"],
}

KEYS = frozenset(known_keys())
SECTIONS = frozenset(key.rpartition(".")[0] for key in KEYS) | {"tiers"}
METRICS = render(
    EngineReport(0, 0, 0, 0, 0, 0, {}, 0, {}, 0, 0, 0, {}, (), ()),
    EdgeReport(0, {}, AdmissionStatistics(0, 0, 0), 0),
)
SOURCES = [
    file for package in ("broker", "engine", "tiers") for file in (ROOT / package).rglob("*.py")
]
OURS = ("broker", "engine", "tiers", "tests", "config", "docs")
MAKEFILE = (ROOT / "Makefile").read_text()

OTHERS = sorted(
    str(file.relative_to(ROOT)) for folder in ("tiers", "tests") for file in (ROOT / folder).rglob("*.md")
)  # fmt: skip

each_page = pytest.mark.parametrize("page", PAGES)
each_page_and_others = pytest.mark.parametrize("page", [*PAGES, *OTHERS])
each_page_of_all = pytest.mark.parametrize(
    "page", [*PAGES, *OTHERS, "CHANGELOG.md"]
)  # which names what is gone


def every(kind):
    """All blocks of that kind, as parameters."""
    found = [one for page in PAGES for one in pages.blocks(page) if one.kind == kind]
    return pytest.mark.parametrize("block", found, ids=[one.place for one in found])


@each_page
def test_every_block_is_of_a_kind_that_is_held_to_something(page):
    for block in pages.blocks(page):
        if block.kind == "toml":
            assert re.fullmatch(r"(~/)?[\w./-]+\.toml", block.rest), block.place
        else:
            assert block.rest in KINDS.get(block.kind, ()), block.place


def test_what_is_not_run_is_listed_here_with_its_reason():
    said = {page: [one.not_run for one in pages.blocks(page) if one.not_run] for page in PAGES}
    assert {page: reasons for page, reasons in said.items() if reasons} == NOT_RUN
    for page, reasons in said.items():
        assert pages.markers(page) == len(reasons), f"{page}: a marker that is over no block"


@each_page_of_all
def test_links_lead_somewhere(page):
    for target in pages.links(page):
        path, _, anchor = target.partition("#")
        found = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert found.exists(), f"{page}: {target}"
        assert found.is_relative_to(ROOT), f"{page}: {target} leaves the repository"
        if anchor:
            assert anchor in pages.anchors(str(found.relative_to(ROOT))), f"{page}: {target}"


def test_the_index_has_every_page():
    listed = {target.partition("#")[0] for target in pages.links("docs/README.md")}
    here = {file.name for file in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert here <= listed
    assert "docs/README.md" in pages.links("README.md")


def keys_named(page):
    """Dotted names that begin as a section does; `{a,b}` and `*` as a shell would read them."""
    sections = "|".join(sorted({one.partition(".")[0] for one in SECTIONS}))
    for one in pages.ticked(page):
        yield from re.findall(
            rf"(?<![\w./:-])(?:{sections})(?:\.[\w*]+|\.\{{[\w,]+\}})+(?!\()", one
        )
    for command in pages.command_said(page):
        for option, value in zip(command.words, command.words[1:], strict=False):
            if option == "--set":
                yield value.partition("=")[0]


def spread(name):
    found = re.match(r"(.*?)\{([\w,]+)\}(.*)", name)
    if found is None:
        return [name]
    return [one for part in found[2].split(",") for one in spread(found[1] + part + found[3])]


@each_page_and_others
def test_every_key_that_is_named_exists(page):
    for name in keys_named(page):
        if name in ("key.path", "tiers.py"):
            continue
        for one in spread(name):
            known = one.removesuffix(".*") in SECTIONS if one.endswith(".*") else one in KEYS
            assert known or one in SECTIONS, f"{page}: {name}"


def leaf(command):
    """The parser that a command's words lead to, and its name."""
    found, named = parser(), []
    for word in command.words:
        choices = next(
            (one.choices for one in found._actions if isinstance(one, argparse._SubParsersAction)),
            None,
        )
        if choices is None or word not in choices:
            break
        found = choices[word]
        named.append(word)
    return found, " ".join(named)


@each_page_and_others
def test_every_command_and_option_that_is_named_exists(page):
    for command in pages.command_said(page):
        said = f"{page}: {command.program} {' '.join(command.words)}"
        if command.program == "homeport":
            found, name = leaf(command)
            assert name or not command.words, said
            for word in command.words:
                if word.lstrip("[").startswith("--"):  # a word in quotes is another program's
                    option = word.strip("[]…").partition("=")[0]
                    assert option in found._option_string_actions, f"{said}: {word}"
        elif command.program == "make":
            assert re.search(rf"(?m)^\.PHONY:.* {command.words[0]}\b", MAKEFILE), said
        elif command.program.startswith("tests."):
            path = ROOT / command.program.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), said


def leaves(found, named=()):
    """{name: its parser}, of every command that does something."""
    for action in found._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from leaves(inner, (*named, word))
            return
    yield " ".join(named)


def test_the_readme_lists_every_command():
    usage = pages.block_of("README.md", "text", "usage").text
    listed = {leaf(command)[1] for command in pages.commands(usage)}
    assert listed | {"unpin"} == set(leaves(parser()))  # `unpin` stands beside `pin`
    assert "`unpin`" in usage


@each_page_and_others
def test_every_metric_that_is_named_exists_with_its_labels(page):
    for name, labels in re.findall(r"\b(homeport_[a-z_]+)(?:\{([^}]*)\})?", pages.text(page)):
        samples = re.findall(rf"(?m)^{name}(?:\{{(.*)\}})? [-\d.]", METRICS)
        assert samples or f"# TYPE {name} " in METRICS, f"{page}: {name}"
        family = re.search(rf"(?m)^{name}(?:_bucket)?\{{(.*)\}}", METRICS)
        for label in re.findall(r"([a-z_]+)(?:=|,|$)", re.sub(r'"[^"]*"', "", labels)):
            assert family is not None, f"{page}: {name} has no labels"
            assert f'{label}="' in family[1], f"{page}: {name}{{{label}}}"


@each_page
def test_every_route_that_is_named_exists(page):
    """`GET /admin/turns`, `/v1/responses/{id}`; without `/v1` as well."""
    known = {re.sub(r"\{\w+\}", "{}", one.path) for one in OPERATIONS}
    methods = {(one.method, re.sub(r"\{\w+\}", "{}", one.path)) for one in OPERATIONS}
    for one in pages.ticked(page):
        found = re.fullmatch(r"(?:(GET|POST|DELETE|PATCH) )?(/[\w/{}]*)(?:\?\w*=?\w*)?", one)
        if found is None or one.startswith(("/proc", "/etc", "/var", "/run")):
            continue
        path = re.sub(r"\{\w+\}", "{}", found[2])
        paths = {path, f"/v1{path}"}
        if path in ("/echo", "/v1", "/admin"):  # the test door of [dev]; prefixes
            continue
        assert paths & known, f"{page}: {one}"
        assert found[1] is None or {(found[1], each) for each in paths} & methods, f"{page}: {one}"


@each_page_and_others
def test_every_field_of_ours_that_is_named_exists(page):
    source = "\n".join(file.read_text() for file in SOURCES)
    for name in re.findall(r"homeport:[a-z_]+", pages.text(page)):
        assert f'"{name}"' in source, f"{page}: {name}"


@each_page
def test_every_file_that_is_named_exists(page):
    files = [file for folder in OURS for file in (ROOT / folder).rglob("*")]
    tracked = {str(file.relative_to(ROOT)) for file in (*files, *ROOT.glob("*.*"))}
    names = {Path(one).name for one in tracked}
    for one in pages.ticked(page):
        for word in re.findall(r"(?<![\w./~-])[\w/.-]+\.(?:py|md|toml)\b", one):
            if word in ("my.toml", "config.toml", "secure.toml"):
                continue
            known = word in tracked if "/" in word else word in names
            assert known or f"tests/{word}" in tracked, f"{page}: {word}"
        if re.fullmatch(r"(?:broker|engine|tiers|tests|config|docs)/[\w/]*", one):
            assert (ROOT / one).is_dir() or (ROOT / one).is_file(), f"{page}: {one}"


def test_the_map_of_the_readme_is_of_what_is_there():
    folder = ROOT
    for line in pages.block_of("README.md", "text", "files").text.splitlines():
        top = re.match(r"(\w+)/", line)
        if top:
            folder = ROOT / top[1]
            assert folder.is_dir(), line
        for word in re.findall(r"[\w.]+\.py|^  (\w+/)", line):
            assert not word or (folder / word).exists(), line
        for word in re.findall(r"\w+\.py", line):
            assert (folder / word).is_file(), line


@every("toml")
def test_configurations_are_taken(block, tmp_path):
    if block.rest.startswith("~"):
        return  # another program's
    (tmp_path / "my.toml").write_text(block.text)
    assert load([tmp_path / "my.toml"]) != Config()


@every("json")
def test_answers_parse(block):
    document = block.text if block.text.startswith("{") else f"{{{block.text}}}"
    assert isinstance(json.loads(document), dict)


@every("python")
def test_programs_compile(block):
    compile(block.text, block.place, "exec")


@every("sh")
def test_shell_parses_and_serves_last(block):
    parsed = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
    assert parsed.returncode == 0, parsed.stderr
    assert not any(command.serves for command in pages.commands(block.text)[:-1]), block.place


@pytest.mark.parametrize("agent", AGENTS.values(), ids=AGENTS)
def test_what_a_real_agent_changes_on_its_page_is_there(agent):
    """tests/clients runs the page as it stands, but for the address and these."""
    text = pages.text(agent.page)
    assert "http://127.0.0.1:8321" in text
    assert agent.context in text
    assert agent.http_only is None or agent.http_only[0] in text
    (started,) = [one for one in pages.blocks(agent.page) if one.not_run]
    assert started.text.splitlines()[-1] == agent.name
