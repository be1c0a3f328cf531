"""The files in serve/deploy that no other test runs: the systemd unit and the Dockerfile.

Not covered: building the image, applying rayservice.yaml. nginx.conf: test_machines.py, serve.yaml: test_ray.py.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI

from oneword.serve.command import command
from oneword.serve.connection import server_config
from oneword.serve.settings import Settings

DEPLOY = Path(__file__).parents[2] / "serve" / "deploy"
DOCS = Path(__file__).parents[2] / "docs"
SYSTEMD = shutil.which("systemd-analyze")


def service_command() -> list[str]:
    found = re.search(r"^ExecStart=(.+)$", (DEPLOY / "oneword.service").read_text(), re.M)
    assert found is not None
    return shlex.split(found[1])


def container_command() -> list[str]:
    text = (DEPLOY / "Dockerfile").read_text()
    lines = dict(re.findall(r"^(ENTRYPOINT|CMD) (\[.+\])$", text, re.M))
    return [*json.loads(lines["ENTRYPOINT"]), *json.loads(lines["CMD"])]


@pytest.mark.parametrize("line", [service_command(), container_command()], ids=["oneword.service", "Dockerfile"])
def test_the_command_line_is_one_that_the_server_takes(line: list[str]) -> None:
    assert Path(line[0]).name == "ti-serve"
    options = command.make_context("ti-serve", line[1:]).params

    assert options["bundle"].is_absolute()
    assert options["keys"].is_absolute()
    assert Path(options["words"]).parent == options["jobs"].parent  # what must be kept is in one folder


def test_service_managers_and_proxies_wait_for_an_hour_as_the_guide_says() -> None:
    for name, pattern in {
        "oneword.service": r"^TimeoutStopSec=(\d+)$",
        "Dockerfile": r"--stop-timeout (\d+) ",
        "rayservice.yaml": r"^ +terminationGracePeriodSeconds: (\d+) ",
        "nginx.conf": r"^ +proxy_read_timeout (\d+)s;",
    }.items():
        (seconds,) = re.findall(pattern, (DEPLOY / name).read_text(), re.M)
        assert int(seconds) == 3600, name


def test_kuberay_starts_workers_as_replicas_need_them_and_lets_them_finish() -> None:
    yaml = pytest.importorskip("yaml")
    cluster = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    (worker,) = pod["containers"]
    (drain,) = (float(v["value"]) for v in worker["env"] if v["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")

    assert workers["minReplicas"] < workers["maxReplicas"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert 0.95 * pod["terminationGracePeriodSeconds"] < drain < pod["terminationGracePeriodSeconds"]


@pytest.mark.skipif(SYSTEMD is None, reason="no systemd-analyze: apt-get install systemd")
def test_systemd_finds_no_fault_with_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "oneword.service"
    unit.write_text((DEPLOY / "oneword.service").read_text().replace(service_command()[0], sys.executable))
    checked = subprocess.run(
        [str(SYSTEMD), "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False, timeout=60
    )

    assert checked.returncode == 0, checked.stderr
    assert "oneword.service" not in checked.stderr


def test_a_proxy_closes_idle_connections_before_the_server_does() -> None:
    """Else a request that it sends just then is lost."""
    server = server_config(FastAPI(), Settings(Path("bundle"))).timeout_keep_alive
    texts = [(DEPLOY / "nginx.conf").read_text(), (DOCS / "guide" / "deploy.md").read_text()]  # of Caddy

    for text in texts:
        seconds = [int(number) for number in re.findall(r"keepalive(?:_timeout)? (\d+)s", text)]
        assert seconds
        assert max(seconds) < server
