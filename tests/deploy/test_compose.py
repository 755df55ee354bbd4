"""The container recipes are consistent in themselves and with the programs; no container runtime is needed."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from coordinator import config
from coordinator.cli import main as cli
from coordinator.store.opening import check_address, is_postgres

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy/compose"
COORDINATORS = ("coordinator1", "coordinator2", "coordinator3")
# Of the Compose specification, what is used here.
KNOWN = {
    "service": {
        "build", "image", "entrypoint", "command", "environment", "secrets", "networks", "depends_on", "healthcheck",
        "restart", "stop_grace_period", "read_only", "tmpfs", "cap_drop", "security_opt", "ulimits", "configs",
        "volumes", "shm_size", "ports",
    },
    "top": {"name", "services", "configs", "secrets", "networks", "volumes"},
}  # fmt: skip


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML, which reads the file, is not installed")
    found: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yml").read_text())
    return found


def settings(compose: dict[str, Any], name: str, tmp_path: Path) -> config.Config:
    """The coordinator's own reading of its text."""
    file = tmp_path / f"{name}.toml"
    file.write_text(compose["configs"][name]["content"])
    return config.load(file)


def test_there_is_nothing_that_compose_does_not_know(compose: dict[str, Any]) -> None:
    assert {key for key in compose if not key.startswith("x-")} <= KNOWN["top"]
    for name, service in compose["services"].items():
        assert set(service) <= KNOWN["service"], name
        assert "image" in service


def test_whatever_is_named_is_there(compose: dict[str, Any]) -> None:
    used: dict[str, set[str]] = {kind: set() for kind in ("secrets", "networks", "volumes", "configs")}
    for service in compose["services"].values():
        used["secrets"] |= set(service.get("secrets", ()))
        used["networks"] |= set(service.get("networks", ()))
        used["volumes"] |= {text.split(":")[0] for text in service.get("volumes", ())}
        used["configs"] |= {one["source"] for one in service.get("configs", ())}
        assert set(service.get("depends_on", {})) <= set(compose["services"])
        for other, wanted in service.get("depends_on", {}).items():
            assert wanted["condition"] != "service_healthy" or "healthcheck" in compose["services"][other]
    for kind, names in used.items():
        assert names == set(compose[kind]), kind


@pytest.mark.parametrize("name", COORDINATORS)
def test_the_program_reads_its_configuration(compose: dict[str, Any], name: str, tmp_path: Path) -> None:
    service, found = compose["services"][name], settings(compose, name, tmp_path)
    assert found.replica is not None
    assert found.replica.advertise == f"{name}:{found.replica.listen.rpartition(':')[2]}"
    secret = Path(found.replica.secret_file)
    assert str(secret.parent) == "/run/secrets"
    assert secret.name in service["secrets"]
    targets = {text.split(":")[1] for text in service["volumes"]}
    assert {found.state, found.blobs.url} == targets
    assert found.behind_proxy == [one["subnet"] for one in compose["networks"]["front"]["ipam"]["config"]]
    assert int(service["stop_grace_period"].removesuffix("s")) >= found.drain_s + 10
    assert f":{found.listen.rpartition(':')[2]}/healthz" in " ".join(service["healthcheck"]["test"])
    store = service["environment"]["COORDINATOR_STORE"]
    check_address(store)
    assert is_postgres(store)
    assert "@db/" in store
    assert compose["services"]["db"]["environment"]["POSTGRES_USER"] in store


@pytest.mark.parametrize("name", COORDINATORS)
def test_every_option_is_one_of_ours(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    arguments = cli._parser().parse_args(service["command"])
    assert arguments.command is cli._serve
    (target,) = [one["target"] for one in service["configs"]]
    assert str(arguments.config) == target
    shell = service["entrypoint"]
    assert shell[:2] == ["/bin/sh", "-c"]
    assert shell[2].replace("$$", "$").endswith('exec coordinator "$@"')
    assert len(shell) == 4  # what follows -c's text is $0


def test_the_proxy_knows_every_coordinator(compose: dict[str, Any], tmp_path: Path) -> None:
    text = (FOLDER / "Caddyfile").read_text()
    assert text.count("{") == text.count("}")
    (line,) = re.findall(r"reverse_proxy (.*) \{", text)
    ports = {name: settings(compose, name, tmp_path).listen.rpartition(":")[2] for name in COORDINATORS}
    assert line.split() == [f"{name}:{port}" for name, port in ports.items()]
    assert "health_uri /healthz" in text
    assert set(COORDINATORS) == {name for name in compose["services"] if name.startswith("coordinator")}
    assert not any("ports" in compose["services"][name] for name in (*COORDINATORS, "db"))


@pytest.mark.parametrize("name", ["coordinator", "worker"])
def test_a_containerfile(name: str) -> None:
    text = (FOLDER / f"Containerfile.{name}").read_text().replace("\\\n", " ")
    words = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    assert words[0][0] == "FROM"
    instructions = {"FROM", "RUN", "COPY", "USER", "ENV", "VOLUME", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in words} <= instructions
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = re.findall(r"/src\[([a-z,0-9-]+)\]", text)
    assert set(wanted.split(",")) <= set(extras)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    (program,) = re.findall(r'ENTRYPOINT \["([a-z]+)"\]', text)
    assert program in scripts
    if program == "coordinator":
        (command,) = re.findall(r"CMD \[(.*)\]", text)
        assert cli._parser().parse_args(shlex.split(command.replace(",", " "))).command is cli._serve
