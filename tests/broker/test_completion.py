"""What Tab offers: the scripts are sourced by the shells themselves, where they are installed; bash is everywhere."""

import shutil
import subprocess

import pytest

from broker.commands.completion import script
from broker.commands.tree import make_parser

ASK_BASH = """
set -u
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
COMP_LINE="$*"
COMP_POINT=${#COMP_LINE}
COMPREPLY=()
"$(complete -p homeport | sed -n 's/.*-F \\([^ ]*\\).*/\\1/p')" homeport "${@: -1}" "${@: -2:1}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "homeport"
    path.write_text(script(make_parser(), "bash"))
    return path


@pytest.fixture
def offered(bash_script, tmp_path):
    def ask(*words):
        """What bash offers for a line that ends in the last word; "" is a word not begun."""
        done = subprocess.run(
            ["bash", "-c", ASK_BASH, "bash", str(bash_script), "homeport", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        return {word.strip() for word in done.stdout.splitlines() if word.strip()}

    return ask


def test_bash_offers_every_command_and_no_other(offered):
    (tree,) = (action for action in make_parser()._actions if hasattr(action, "add_parser"))
    assert offered("") >= set(tree.choices)
    assert offered("de") == {"demote"}
    assert offered("config", "ch") == {"check"}
    assert offered("bench", "") >= {"agent", "policy", "tiers", "events", "serve"}


def test_bash_offers_options_and_what_an_option_takes(offered):
    assert offered("serve", "--st") == {"--state-dir"}
    assert offered("demote", "--tier", "") == {"host", "disk"}
    assert offered("completion", "") >= {"bash", "zsh", "fish"}
    assert offered("serve", "--tier") == set()


def test_bash_offers_files_where_a_file_is_meant_and_folders_where_a_folder_is(offered, tmp_path):
    (tmp_path / "homeport.toml").touch()
    (tmp_path / "state").mkdir()
    assert offered("serve", "--config", "h") == {"homeport.toml"}
    assert offered("config", "check", "home") == {"homeport.toml"}
    assert offered("serve", "--state-dir", "") == {"state"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_a_script_that_knows_the_commands_and_parses(shell, tmp_path):
    text = script(make_parser(), shell)
    for word in ("serve", "state-dir", "forget", "agent"):
        assert word in text
    if shutil.which(shell) is None:
        return  # its own syntax check is an addition; the words above are the test
    path = tmp_path / "script"
    path.write_text(text)
    subprocess.run([shell, "-n", str(path)], check=True)
