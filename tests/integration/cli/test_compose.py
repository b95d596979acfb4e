"""The compose files: what `docker compose` makes of them, without an engine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]


def _compose() -> list[str]:
    docker = shutil.which("docker")
    if (
        docker
        and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0
    ):
        return [docker, "compose"]
    old = shutil.which("docker-compose")
    if old:
        return [old]
    pytest.fail("neither `docker compose` nor docker-compose is installed: apt-get install docker-compose")


def _config(*files: str) -> dict:
    command = _compose() + [part for name in files for part in ("-f", name)] + ["config"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return yaml.safe_load(answer.stdout)


def test_the_compose_file_describes_every_process() -> None:
    services = _config("docker-compose.yml")["services"]

    assert set(services) == {"etcd", "controller", "store", "node_agent", "gateway"}
    assert all("healthcheck" in service for service in services.values())


def test_every_setting_in_the_compose_file_is_one_its_service_knows() -> None:
    """A misspelt variable would be refused at start: find it here."""
    from services.controller.settings import ControllerSettings
    from services.gateway.settings import GatewaySettings
    from services.node_agent.settings import NodeAgentSettings
    from services.store.settings import StoreSettings

    known = {
        "controller": ControllerSettings,
        "gateway": GatewaySettings,
        "node_agent": NodeAgentSettings,
        "store": StoreSettings,
    }
    services = _config("docker-compose.yml")["services"]
    for name, cls in known.items():
        prefix = f"STOKER_{name.upper()}_"
        used = {
            key.removeprefix(prefix).lower()
            for key in services[name]["environment"]
            if key.startswith(prefix)
        }
        assert used, name
        assert used <= set(cls.model_fields), name


def test_the_gpu_override_gives_the_node_agent_the_devices() -> None:
    merged = _config("docker-compose.yml", "docker-compose.gpu.yml")["services"]["node_agent"]

    (device,) = merged["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert merged["command"] == ["services.node_agent"]
