"""`homeport init`, with the real disk and the real torch of this machine."""

import hashlib
import re
import stat

import pytest
import trio

from broker.__main__ import main
from broker.access import Access
from broker.commands import init
from broker.commands.failed import CommandFailed
from broker.config import load
from tests.broker.test_cli import daemon, run


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to stand in, and a disk that is measured in a moment."""
    monkeypatch.setattr(init, "_MEASURED_BYTES", 8 << 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def keys(said):
    client = re.search(r"^client key +(\S+)$", said, re.MULTILINE)[1]
    return client, re.search(r"^operator key +(\S+)$", said, re.MULTILINE)[1]


def test_a_new_user_gets_a_private_file_that_is_good_and_two_keys(place, capsys):
    assert main(["init", "--state-dir", "state"]) == 0
    said = capsys.readouterr()
    assert "measuring the disk" in said.err
    written = place / "homeport.toml"
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert stat.S_IMODE((place / "state").stat().st_mode) == 0o700
    assert {path.name for path in place.iterdir()} == {"homeport.toml", "state"}
    assert list((place / "state").iterdir()) == []
    assert main(["config", "check", "homeport.toml"]) == 0
    assert load([written]).server.state_dir == place / "state"
    assert written.name in said.out


def test_keys_are_in_the_file_as_digests_only_and_open_the_daemon(place, capsys):
    assert main(["init", "--state-dir", "state"]) == 0
    client, operator = keys(capsys.readouterr().out)
    text = (place / "homeport.toml").read_text()
    assert client not in text
    assert operator not in text
    assert f"sha256:{hashlib.sha256(client.encode()).hexdigest()}" in text
    assert len(set(client)) > 8
    auth = load([place / "homeport.toml"]).auth
    access = Access(host="127.0.0.1", keys=auth.keys, operators=auth.operators, secret=b"s")

    def admitted(key):
        return access.admit([(b"host", b"localhost"), (b"authorization", b"Bearer " + key)])

    assert not admitted(client.encode()).operator
    assert admitted(operator.encode()).operator


def test_a_file_that_is_there_is_not_touched_and_nothing_is_measured(place, capsys, monkeypatch):
    (place / "homeport.toml").write_text("# mine\n")
    monkeypatch.setattr(init, "_look", lambda *_: pytest.fail("looked"))
    assert main(["init", "--state-dir", "state"]) == 1
    assert "exists; --force" in capsys.readouterr().err
    assert (place / "homeport.toml").read_text() == "# mine\n"
    assert not (place / "state").exists()
    (place / "link.toml").symlink_to("nowhere")
    assert main(["init", "--config", "link.toml"]) == 1
    assert not (place / "nowhere").exists()


def test_a_file_that_appears_meanwhile_is_not_touched_either(place, capsys, monkeypatch):
    look = init._look

    def slow_look(*arguments):
        (place / "homeport.toml").write_text("# somebody was faster\n")
        return look(*arguments)

    monkeypatch.setattr(init, "_look", slow_look)
    assert main(["init", "--state-dir", "state"]) == 1
    said = capsys.readouterr()
    assert "exists; --force" in said.err
    assert "key" not in said.out
    assert (place / "homeport.toml").read_text() == "# somebody was faster\n"
    assert {path.name for path in place.iterdir()} == {"homeport.toml", "state"}


def test_force_replaces_the_file_and_its_keys(place, capsys):
    assert main(["init", "--state-dir", "state"]) == 0
    first = keys(capsys.readouterr().out)
    assert main(["init", "--state-dir", "state", "--force"]) == 0
    second = keys(capsys.readouterr().out)
    assert not set(first) & set(second)
    digest = hashlib.sha256(second[0].encode()).hexdigest()
    assert digest in (place / "homeport.toml").read_text()


def test_a_file_that_would_not_load_never_gets_its_name(place):
    with pytest.raises(CommandFailed, match="unknown key"):
        init.write(place / "homeport.toml", "[server]\nprot = 1\n", replace=True)
    with pytest.raises(CommandFailed, match=r"auth\.keys"):
        init.write(place / "homeport.toml", "[server]\nhost = '0.0.0.0'\n", replace=False)
    assert list(place.iterdir()) == []


def test_what_cannot_be_written_or_used_is_one_line(place, capsys):
    (place / "file").touch()
    assert main(["init", "--config", "absent/homeport.toml", "--state-dir", "state"]) == 1
    assert "absent/homeport.toml: cannot be written" in capsys.readouterr().err
    assert main(["init", "--state-dir", "file/state"]) == 1
    assert "choose another --state-dir" in capsys.readouterr().err
    (place / "shared").mkdir()
    (place / "shared").chmod(0o777)
    assert main(["init", "--state-dir", "shared"]) == 1
    assert "other users may write" in capsys.readouterr().err


async def test_the_daemon_starts_with_it(place, capsys):
    assert await run("init", "--state-dir", "state") == 0
    _, operator = keys(capsys.readouterr().out)
    text = (place / "homeport.toml").read_text()
    with trio.fail_after(60):
        sets = [line.partition(" #")[0] for line in _assignments(text)]
        async with daemon(place / "state", *sets) as (url, _):
            assert await run("tiers", "--url", url) == 1
            assert await run("tiers", "--url", url, "--key", operator) == 0


def _assignments(text):
    """A file as `--set` would have it: the daemon of these tests has no other door."""
    section = ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.partition("]")[0].strip("[")
        elif line and not line.startswith("#"):
            key, value = line.split(" = ", 1)
            yield f"{section}.{key}={value}"
