"""Everything under `deploy/` as data, and what must hold of it: each check answers a sentence for each thing that is wrong.

Docker and a cluster are not here. What these checks hold against the manifests is the code itself (settings, routes, commands,
topics, time limits) and the schemas of those who read them; `test_containers.py` runs what they say.
"""

import copy
import fnmatch
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import kubernetes_validate
import typer
import yaml
from pydantic import SecretStr, ValidationError

from workers import cli, consumer, serving, topics, worker
from workers.contract import contract_files
from workers.gateway import connections
from workers.settings import INBOUND_TOPICS, OUTBOUND_TOPICS, Settings
from workers.topics import DEAD_LETTER_TOPICS, TOPICS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = "1.34"
IMAGE = "credit-workers"
OURS = ("migrate", "topics", "worker", "gateway")  # services of the compose file that run our image
WORKER_PATHS = {"/livez", "/readyz", "/metrics"}  # test_containers.py asks for them
# What a login may open beside workers and gateways: a migration, a person.
CONNECTIONS_SPARE = 4
# A worker writes to the database twice when it stops, each within two seconds, then closes its pool within five.
WORKER_LAST_WORDS_SECONDS = 2 + 2 + 5
STOP_SECONDS = {
    "worker": (
        serving.STOP_SECONDS
        + worker.ALERT_SECONDS
        + consumer.STOP_SECONDS
        + worker.CANCEL_SECONDS * worker.CANCELS_MAX
        + WORKER_LAST_WORDS_SECONDS
    ),
    "gateway": serving.STOP_SECONDS + 2 * connections.CLOSE_SECONDS,
}


@dataclass
class Manifests:
    """All of it, as it is read; a test may break a copy."""

    dockerfile: str
    dockerignore: str
    compose: dict[str, Any]
    kubernetes: list[dict[str, Any]]
    overlay: dict[str, str]
    secrets: list[dict[str, Any]]
    strimzi: list[dict[str, Any]]
    prometheus: dict[str, Any]
    logins: str
    kustomizations: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, kind: str, name: str | None = None) -> dict[str, Any]:
        """The manifest of this kind, and of this name if there are several."""
        (found,) = (
            one
            for one in (*self.kubernetes, *self.strimzi)
            if one["kind"] == kind and name in {None, one["metadata"]["name"]}
        )
        return found

    def pods(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Everything that runs containers in a cluster: its name, and its pod."""
        for one in self.kubernetes:
            template = one.get("spec", {}).get("template")
            if template is not None:
                yield one["metadata"]["name"], template["spec"]

    def containers(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every container of a cluster, with the name of what runs it."""
        for name, pod in self.pods():
            for container in (*pod.get("initContainers", ()), *pod["containers"]):
                yield name, container

    def environment(self, container: dict[str, Any]) -> dict[str, str]:
        """What a container of a cluster is told, the overlay's settings included."""
        told = dict(self.overlay) if container.get("envFrom") else {}
        return told | {one["name"]: one["value"] for one in container.get("env", ())}


def read() -> Manifests:
    """The manifests as they are in the repository; a copy, to be broken at will."""
    return copy.deepcopy(_read())


@cache
def _read() -> Manifests:
    kubernetes = DEPLOY / "kubernetes"
    base = yaml.safe_load((kubernetes / "base" / "kustomization.yaml").read_text())
    return Manifests(
        dockerfile=(DEPLOY / "Dockerfile").read_text(),
        dockerignore=(ROOT / ".dockerignore").read_text(),
        compose=yaml.safe_load((ROOT / "docker-compose.yml").read_text()),
        kubernetes=[
            one for name in base["resources"] for one in documents(kubernetes / "base" / name)
        ],
        overlay=dict(
            line.split("=", 1)
            for line in (kubernetes / "example" / "settings.env").read_text().splitlines()
        ),
        secrets=documents(kubernetes / "example" / "secrets.example.yaml"),
        strimzi=[
            one for path in sorted((DEPLOY / "strimzi").glob("*.yaml")) for one in documents(path)
        ],
        prometheus=yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text()),
        logins=(DEPLOY / "postgres" / "logins.sql").read_text(),
        kustomizations={
            folder: yaml.safe_load((kubernetes / folder / "kustomization.yaml").read_text())
            for folder in ("base", "example")
        },
    )


def documents(path: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return list(
        yaml.load_all(path.read_text(), yaml.CSafeLoader)
    )  # the same, and ten times as fast


@cache
def schema(name: str) -> dict[str, Any]:
    """A schema that we keep."""
    return json.loads((DEPLOY / "schemas" / f"{name}.json").read_text())


def errors_of(name: str, document: dict[str, Any]) -> Iterator[str]:
    """What a schema does not take, and where."""
    validator = jsonschema_rs.Draft202012Validator(schema(name))
    for error in validator.iter_errors(document):
        yield f"{'.'.join(map(str, error.instance_path))}: {error.message}"


Check = Callable[[Manifests], Iterator[str]]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Register what must hold."""
    CHECKS[function.__name__] = function
    return function


# -- formats ----------------------------------------------------------------------------------------------------------


@check
def kinds_have_their_form(all_: Manifests) -> Iterator[str]:
    """Each manifest is what its kind's schema takes."""
    for one in (*all_.kubernetes, *all_.strimzi, *all_.secrets):
        where = f"{one['kind']} {one['metadata']['name']}"
        kind = one["kind"]
        if (DEPLOY / "schemas" / f"{kind}.json").is_file():
            of = schema(kind)
            if of["x-of"] != f"{one['apiVersion']} {one['kind']}":
                yield f"{where} is {one['apiVersion']}, and not {of['x-of']}"
            yield from (f"{where}: {error}" for error in errors_of(kind, one))
        else:
            try:
                kubernetes_validate.validate(one, KUBERNETES, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"{where}: {error.message}"


@check
def compose_has_its_form(all_: Manifests) -> Iterator[str]:
    """The compose file is what its specification takes."""
    yield from errors_of("compose", all_.compose)


@check
def a_kustomization_names_what_is_there(all_: Manifests) -> Iterator[str]:
    """Every file of the base is a resource, and every file that is named exists."""
    folder = DEPLOY / "kubernetes"
    named = set(all_.kustomizations["base"]["resources"])
    there = {path.name for path in (folder / "base").glob("*.yaml")} - {"kustomization.yaml"}
    yield from (f"base: {name} is no resource" for name in there - named)
    yield from (f"base: {name} is not there" for name in named - there)
    example = all_.kustomizations["example"]
    wanted = [*example["resources"]]
    for made in example["configMapGenerator"]:
        wanted += [*made.get("envs", ()), *made.get("files", ())]
    yield from (
        f"example: {name} is not there"
        for name in wanted
        if not (folder / "example" / name).exists()
    )
    made = {one["name"] for one in example["configMapGenerator"]}
    for name, pod in all_.pods():
        used = {
            source["configMapRef"]["name"]
            for one in pod["containers"]
            for source in one.get("envFrom", ())
        }
        used |= {volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume}
        yield from (f"{name} needs ConfigMap {one}, which no overlay makes" for one in used - made)


# -- settings and secrets ---------------------------------------------------------------------------------------------


def environments(all_: Manifests) -> Iterator[tuple[str, str, dict[str, str]]]:
    """What every container of ours is told: its name, the command that it runs, its environment over that of the image."""
    image = image_environment(all_.dockerfile)
    for name in OURS:
        service = all_.compose["services"][name]
        yield f"compose {name}", service["command"][0], image | service["environment"]
    for name, container in all_.containers():
        yield f"kubernetes {name}", container["args"][0], image | all_.environment(container)


def image_environment(dockerfile: str) -> dict[str, str]:
    """What the last stage sets."""
    last = dockerfile[dockerfile.rindex("\nFROM ") :].replace("\\\n", " ")
    told: dict[str, str] = {}
    for line in last.splitlines():
        if line.startswith("ENV "):
            told |= dict(part.split("=", 1) for part in shlex.split(line)[1:])
    return told


@check
def settings_are_known_and_taken(all_: Manifests) -> Iterator[str]:
    """Every variable is a setting's, and its value one that the setting takes."""
    for where, _command, told in environments(all_):
        for name, value in told.items():
            if not name.startswith("CREDITS_"):
                continue
            setting = setting_of(name)
            if setting is None:
                yield f"{where}: {name} is no setting"
            elif not name.endswith("_FILE") or is_path(setting):
                try:
                    Settings(**{setting: value})
                except ValidationError as error:
                    yield f"{where}: {name}: {error.errors()[0]['msg']}"


def setting_of(variable: str) -> str | None:
    """The setting that a variable gives, by itself or by a file."""
    name = variable.removeprefix("CREDITS_").lower()
    if name in Settings.model_fields:
        return name
    name = name.removesuffix("_file")
    return name if name in Settings.model_fields and variable.endswith("_FILE") else None


def is_path(setting: str) -> bool:
    """Whether the setting itself is a file's path."""
    return setting.endswith("_file")


@check
def secrets_come_from_files(all_: Manifests) -> Iterator[str]:
    """No secret stands in an environment; each file of one is mounted where it is looked for."""
    for where, _command, told in environments(all_):
        for name in told:
            setting = setting_of(name)
            if setting is None or not is_secret(setting):
                continue
            if not name.endswith("_FILE"):
                yield f"{where}: {name} stands in the environment: name a file"
    for name in OURS:
        service = all_.compose["services"][name]
        mounted = {f"/run/secrets/{secret}" for secret in service.get("secrets", ())}
        wanted = {
            value
            for variable, value in service["environment"].items()
            if variable.endswith("_FILE")
        }
        yield from (f"compose {name}: {path} is not mounted" for path in wanted - mounted)
        yield from (f"compose {name}: {path} is mounted for nothing" for path in mounted - wanted)
    kept = {(one["metadata"]["name"], key) for one in all_.secrets for key in one["stringData"]}
    for name, pod in all_.pods():
        names = {
            one["name"]: one["secret"]["secretName"] for one in pod["volumes"] if "secret" in one
        }
        for container in pod["containers"]:
            at = {one["mountPath"]: names.get(one["name"]) for one in container["volumeMounts"]}
            for variable, path in all_.environment(container).items():
                if variable.endswith("_FILE") and variable.startswith("CREDITS_"):
                    folder, _, key = path.rpartition("/")
                    if (at.get(folder), key) not in kept:
                        yield f"kubernetes {name}: {path} is mounted from no secret that is listed"
    for one in all_.kubernetes:
        if one["kind"] == "TriggerAuthentication":
            for reference in one["spec"]["secretTargetRef"]:
                if (reference["name"], reference["key"]) not in kept:
                    yield f"KEDA: {reference['name']}/{reference['key']} is in no secret that is listed"


def is_secret(setting: str) -> bool:
    """Whether a setting must never be shown."""
    return SecretStr.__name__ in str(Settings.model_fields[setting].annotation)


@check
def who_needs_a_server_is_told_which(all_: Manifests) -> Iterator[str]:
    """A command has the settings without which it ends at once, and the login that is its own."""
    needs = {
        "worker": {"database_url", "kafka_bootstrap", "stripe_webhook_secrets", "worker_port"},
        "gateway": {"database_url", "kafka_bootstrap", "stripe_webhook_secrets", "read_tokens", "admin_tokens", "session_key", "http_port"},
        "migrate": {"database_url"},
        "topics": {"kafka_bootstrap"},
    }  # fmt: skip
    for where, command, told in environments(all_):
        has = {setting_of(name) for name in told if name.startswith("CREDITS_")}
        yield from (f"{where}: nothing gives {name}" for name in needs.get(command, set()) - has)
        if told.get("CREDITS_STACK") != "external":
            yield f"{where}: would start servers of its own"
        owner = "owner" in told.get("CREDITS_DATABASE_URL_FILE", "")
        if owner is not (command == "migrate") and "CREDITS_DATABASE_URL_FILE" in told:
            yield f"{where}: has the wrong login for the database"


# -- commands, ports, paths -------------------------------------------------------------------------------------------


@check
def commands_are_those_of_the_cli(all_: Manifests) -> Iterator[str]:
    """What a container runs is a command of `credits`."""
    known = set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    if 'ENTRYPOINT ["credits"]' not in all_.dockerfile:
        yield "the image does not begin with `credits`"
    for where, command, _told in environments(all_):
        if command not in known:
            yield f"{where}: `credits {command}` is no command"


@cache
def gateway_paths() -> set[str]:
    """The paths that the gateway describes."""
    return set(json.loads(contract_files()["openapi.json"])["paths"])


def port_of(command: str, told: dict[str, str]) -> int:
    """Where this container answers."""
    return int(told["CREDITS_WORKER_PORT" if command == "worker" else "CREDITS_HTTP_PORT"])


@check
def probes_ask_what_answers(all_: Manifests) -> Iterator[str]:
    """Every probe has a port that is listened to, and a path that exists; each process has all three."""
    for name, container in all_.containers():
        command = container["args"][0]
        if command not in {"worker", "gateway"}:
            continue
        told = image_environment(all_.dockerfile) | all_.environment(container)
        ports = {one["name"]: one["containerPort"] for one in container["ports"]}
        if set(ports.values()) != {port_of(command, told)}:
            yield f"{name}: listens on {port_of(command, told)}, and says {ports}"
        if told["CREDITS_HTTP_HOST"] != "0.0.0.0":
            yield f"{name}: listens on {told['CREDITS_HTTP_HOST']}, where no probe reaches it"
        paths = WORKER_PATHS if command == "worker" else gateway_paths()
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container.get(probe, {}).get("httpGet")
            if asked is None:
                yield f"{name}: has no {probe}"
            elif asked["port"] not in ports or asked["path"] not in paths:
                yield f"{name}: its {probe} asks {asked}"
        if container.get("livenessProbe", {}).get("httpGet", {}).get("path") != "/livez":
            yield f"{name}: would be killed for what others do: a livenessProbe asks /livez alone"


@check
def traffic_goes_where_somebody_listens(all_: Manifests) -> Iterator[str]:
    """Service, Ingress, monitors, policies and scrapes name ports and paths that exist, and no more of them than meant."""
    ports = {
        port["name"]: port["containerPort"]
        for _name, container in all_.containers()
        for port in container.get("ports", ())
    }
    service = all_.of("Service")
    named = {port["name"] for port in service["spec"]["ports"]}
    yield from (
        f"the Service leads to {one['targetPort']}"
        for one in service["spec"]["ports"]
        if one["targetPort"] not in ports
    )
    for rule in all_.of("Ingress")["spec"]["rules"]:
        for one in rule["http"]["paths"]:
            backend = one["backend"]["service"]
            if (
                backend["name"] != service["metadata"]["name"]
                or backend["port"]["name"] not in named
            ):
                yield f"the Ingress leads to {backend}"
            exact = one["pathType"] == "Exact"
            met = {
                path
                for path in gateway_paths()
                if path == one["path"] or (not exact and path.startswith(one["path"] + "/"))
            }
            if not met or one["path"] not in {"/webhooks/stripe", "/v1"}:
                yield f"the Ingress opens {one['path']}"
    for monitor in all_.of("PodMonitor")["spec"]["podMetricsEndpoints"]:
        if monitor["port"] not in ports or monitor["path"] not in WORKER_PATHS & gateway_paths():
            yield f"the PodMonitor asks {monitor}"
    for policy in (one for one in all_.kubernetes if one["kind"] == "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", ()):
            yield from (
                f"{policy['metadata']['name']} opens {one['port']}"
                for one in rule["ports"]
                if one["port"] not in ports
            )
            if not rule.get("from"):
                yield f"{policy['metadata']['name']} lets everybody in"
        for rule in policy["spec"].get("egress", ()):
            if not rule.get("to") or not rule.get("ports"):
                yield f"{policy['metadata']['name']} lets everything out"
    denied = all_.of("NetworkPolicy", "credits-nothing")["spec"]
    if denied != {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}:
        yield "what no policy names is not refused"
    scraped = {
        one["names"][0]: one["port"]
        for job in all_.prometheus["scrape_configs"]
        for one in job["dns_sd_configs"]
    }
    for name in ("worker", "gateway"):
        told = image_environment(all_.dockerfile) | all_.compose["services"][name]["environment"]
        if scraped.get(name) != port_of(name, told):
            yield f"Prometheus asks {name} at {scraped.get(name)}"
    published = all_.compose["services"]["gateway"]["ports"]
    if not all(
        str(one).startswith("127.0.0.1:") and str(one).endswith(":8080") for one in published
    ):
        yield f"the compose file publishes {published}"


@check
def labels_select_what_is_meant(all_: Manifests) -> Iterator[str]:
    """Every selector meets the pods that it is about, and no others."""
    labels = {
        one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"]
        for one in all_.kubernetes
        if "template" in one.get("spec", {})
    }
    for one in all_.kubernetes:
        if one["kind"] in {"Deployment", "PodDisruptionBudget"}:
            wanted = one["spec"]["selector"]["matchLabels"]
        elif one["kind"] == "Service":
            wanted = one["spec"]["selector"]
        else:
            continue
        met = {name for name, has in labels.items() if wanted.items() <= has.items()}
        if met != {one["metadata"]["name"]}:
            yield f"{one['kind']} {one['metadata']['name']} selects {met}"


# -- what keeps money safe --------------------------------------------------------------------------------------------


@check
def there_is_time_to_end_in_order(all_: Manifests) -> Iterator[str]:
    """Whoever stops a process waits for longer than it may take."""
    for name in ("worker", "gateway"):
        given = float(all_.compose["services"][name]["stop_grace_period"].removesuffix("s"))
        if given <= STOP_SECONDS[name]:
            yield f"compose {name} has {given:g} s to end, and may take {STOP_SECONDS[name]:g} s"
    for name, pod in all_.pods():
        container = pod["containers"][0]
        pause = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        given = pod["terminationGracePeriodSeconds"]
        if given <= pause + STOP_SECONDS.get(container["args"][0], 0):
            yield f"{name} has {given} s to end, and may take {STOP_SECONDS[container['args'][0]]:g} s after {pause} s"


@check
def nobody_is_root_or_writes(all_: Manifests) -> Iterator[str]:
    """Every container is what the restricted standard asks for, and more: only /tmp can be written, and nobody has a token."""
    users = re.findall(r"^USER (\S+)$", all_.dockerfile, re.MULTILINE)
    if not users or re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]) is None:
        yield f"the image's user is {users[-1:]}: a cluster believes a number alone"
    for name, pod in all_.pods():
        context = pod.get("securityContext", {})
        if not (
            context.get("runAsNonRoot")
            and context.get("runAsUser") == 65532
            and context.get("runAsGroup") == 65532
        ):
            yield f"{name} may be root"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{name} may call anything of the kernel"
        if pod.get("automountServiceAccountToken") is not False:
            yield f"{name} is given a token"
        if pod.get("enableServiceLinks") is not False:
            yield f"{name} is told of services in variables that may be our settings"
        if any(pod.get(one) for one in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{name} shares its host's namespaces"
        written = {one["name"] for one in pod["volumes"] if "emptyDir" in one or "hostPath" in one}
        if written != {"tmp"}:
            yield f"{name} may write to {written}"
    for name, container in all_.containers():
        if container.get("securityContext") != {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        }:  # fmt: skip
            yield f"{name} may do more than it must"
        if "memory" not in container.get("resources", {}).get("limits", {}):
            yield f"{name} may take all memory"
        for mount in container["volumeMounts"]:
            if mount["mountPath"] != "/tmp" and not mount.get("readOnly"):
                yield f"{name} may write to {mount['mountPath']}"
    for name in OURS:
        service = all_.compose["services"][name]
        if not service.get("read_only") or service.get("user") or service.get("privileged"):
            yield f"compose {name} may write, or is somebody else"
        if any(not one.startswith("/tmp:") for one in service["tmpfs"]) or service.get("volumes"):
            yield f"compose {name} may write elsewhere than to /tmp"
    for name, service in all_.compose["services"].items():
        if service.get("cap_drop") != ["ALL"] or "no-new-privileges:true" not in service.get(
            "security_opt", ()
        ):
            yield f"compose {name} may gain rights"


@check
def the_image_is_one_and_pinned(all_: Manifests) -> Iterator[str]:
    """All that we run is one image, and every image has a version."""
    for name, container in all_.containers():
        if container["image"] != IMAGE:
            yield f"{name} runs {container['image']}"
    overlay = {one["name"]: one for one in all_.kustomizations["example"]["images"]}
    if (
        IMAGE not in overlay
        or not overlay[IMAGE].get("newTag", "").strip()
        or overlay[IMAGE]["newTag"] == "latest"
    ):
        yield "the overlay gives the image no version"
    images = {all_.compose["services"][name]["image"] for name in OURS}
    if len(images) != 1:
        yield f"compose runs {sorted(images)} of ours"
    base = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", all_.dockerfile, re.MULTILINE)
    others = [one["image"] for name, one in all_.compose["services"].items() if name not in OURS]
    for image in (*base, *others):
        if re.search(r":v?\d+\.\d+(\.\d+)?(-[a-z]+)*(@sha256:[0-9a-f]{64})?$", image) is None:
            yield f"{image} is not pinned to a version"
    for line in re.findall(r"^FROM (\S+)", all_.dockerfile, re.MULTILINE):
        if line != "${PYTHON_IMAGE}":
            yield f"the Dockerfile begins with {line} too"


@check
def the_image_is_what_was_locked(all_: Manifests) -> Iterator[str]:
    """Nothing is installed but by hash; no servers, no tools of developers; what is copied is let through."""
    text = all_.dockerfile.replace("\\\n", " ")
    for wanted in (
        "--require-hashes",
        "--frozen",
        "--no-build",
        "--no-default-groups",
        "--compile-bytecode",
        "HEALTHCHECK",
    ):
        if wanted not in text:
            yield f"the Dockerfile lacks {wanted}"
    for unwanted in (
        "embedded",
        "--all-extras",
        "--all-groups",
        "--group dev",
        "apt-get",
        "curl ",
        "ADD ",
    ):
        if unwanted in text:
            yield f"the Dockerfile has {unwanted}"
    allowed = [line[1:] for line in all_.dockerignore.splitlines() if line.startswith("!")]
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            if source not in allowed:
                yield f"COPY {source}: .dockerignore keeps it out"
            if not (ROOT / source).exists():
                yield f"COPY {source}: it is not there"
    secret = [one for one in allowed if fnmatch.fnmatch("deploy/secrets/x", one + "*")]
    yield from (f"secrets get into the image's context by {one}" for one in secret)


@check
def workers_are_as_many_as_there_is_work_for(all_: Manifests) -> Iterator[str]:
    """Never none, never more than partitions or connections, and every topic counts."""
    scaling = all_.of("ScaledObject")["spec"]
    partitions = int(all_.overlay["CREDITS_PARTITIONS"])
    if not 1 <= scaling["minReplicaCount"] <= scaling["maxReplicaCount"] <= partitions:
        yield f"{scaling['minReplicaCount']} to {scaling['maxReplicaCount']} workers read {partitions} partitions"
    if scaling["fallback"]["replicas"] < scaling["minReplicaCount"]:
        yield "fewer workers than the least where KEDA cannot ask"
    asked = {one["metadata"]["topic"]: one["metadata"] for one in scaling["triggers"]}
    yield from (f"nobody counts what waits in {name}" for name in set(INBOUND_TOPICS) - set(asked))
    for name, metadata in asked.items():
        if metadata["consumerGroup"] != f"credit-workers.{name}":
            yield f"{metadata['consumerGroup']} is no group of ours"
        if metadata["bootstrapServers"] != all_.overlay["CREDITS_KAFKA_BOOTSTRAP"]:
            yield "KEDA asks another Kafka"
        if metadata["offsetResetPolicy"] != "earliest" or metadata["allowIdleConsumers"] != "false":
            yield f"KEDA counts {name} otherwise than it is read"
    roll = all_.of("Deployment", "credits-worker")["spec"]["strategy"]["rollingUpdate"]
    if roll["maxSurge"] != 0:
        yield "a roll-out has more workers than partitions, and waits for one that gets none"
    if (
        "replicas" in all_.of("Deployment", "credits-worker")["spec"]
        or "replicas" in all_.of("Deployment", "credits-gateway")["spec"]
    ):
        yield "a Deployment that says how many takes back what was scaled"
    pools = {}
    for name, container in all_.containers():
        told = all_.environment(container)
        default = Settings.model_fields["database_pool_max"].default
        pools[name] = int(told.get("CREDITS_DATABASE_POOL_MAX", default))
    gateways = all_.of("HorizontalPodAutoscaler")["spec"]["maxReplicas"]
    # The relay has a connection of its own.
    wanted = (
        scaling["maxReplicaCount"] * (pools["credits-worker"] + 1)
        + gateways * pools["credits-gateway"]
    )
    limit = int(re.findall(r"CONNECTION LIMIT (\d+)", all_.logins)[0])
    most = int(
        re.findall(
            r"max_connections=(\d+)", " ".join(all_.compose["services"]["postgres"]["command"])
        )[0]
    )
    if wanted > limit or limit + CONNECTIONS_SPARE > most:
        yield f"{wanted} connections are wanted, the login has {limit}, the server {most}"


# -- Kafka ------------------------------------------------------------------------------------------------------------


@check
def topics_are_made_as_the_code_makes_them(all_: Manifests) -> Iterator[str]:
    """Every topic, with the partitions and settings of the code."""
    settings = Settings.model_construct(replication_factor=3)
    made = {
        one["metadata"]["name"]: one["spec"] for one in all_.strimzi if one["kind"] == "KafkaTopic"
    }
    yield from (f"{name} is not made" for name in set(TOPICS) - set(made))
    yield from (f"{name} is no topic of ours" for name in set(made) - set(TOPICS))
    for name, spec in made.items():
        config = {option: str(value) for option, value in spec["config"].items()}
        if (
            config != topics.topic_settings(name, settings)
            or spec["partitions"] != settings.partitions
        ):
            yield f"{name} differs from what `credits topics` makes"


def rights(all_: Manifests) -> set[tuple[str, str, str, str]]:
    """Who may do what: user, operation, kind of resource, and its name."""
    return {
        (
            one["metadata"]["name"],
            operation,
            rule["resource"]["type"],
            rule["resource"].get("name", ""),
        )
        for one in all_.strimzi
        if one["kind"] == "KafkaUser"
        for rule in one["spec"]["authorization"]["acls"]
        for operation in rule["operations"]
    }


@check
def nobody_may_more_on_kafka_than_it_must(all_: Manifests) -> Iterator[str]:
    """The worker reads what comes in and writes what goes out; nobody else writes what subscribers believe."""
    given = rights(all_)
    dead, out = set(DEAD_LETTER_TOPICS), set(OUTBOUND_TOPICS)
    wanted = {("credits-worker", "Read", "topic", name) for name in INBOUND_TOPICS}
    wanted |= {("credits-worker", "Write", "topic", name) for name in out | dead}
    wanted |= {("credits-worker", "Read", "group", "credit-workers.")}
    wanted |= {("credits-gateway", "Describe", "topic", name) for name in TOPICS}
    wanted |= {("credits-gateway", "Write", "topic", "stripe.webhook")}
    yield from (f"{user} may not {verb} {kind} {name}" for user, verb, kind, name in wanted - given)
    for user, verb, kind, name in given:
        if verb not in {"Read", "Write", "Describe", "DescribeConfigs"} or kind not in {
            "topic",
            "group",
        }:
            yield f"{user} may {verb} {kind} {name}"
        if verb == "Write" and name in out | dead and user != "credits-worker":
            yield f"{user} may write {name}, which subscribers believe"
        if name == "*" and verb not in {"Describe", "DescribeConfigs"}:
            yield f"{user} may {verb} everything"
        if (
            kind == "group"
            and verb == "Read"
            and name.startswith("credit-workers")
            and user != "credits-worker"
        ):
            yield f"{user} may take records from the workers"
    for name in INBOUND_TOPICS:
        writers = {user for user, verb, _kind, topic in given if verb == "Write" and topic == name}
        if len(writers) != 1:
            yield f"{sorted(writers)} may write {name}: each topic is one service's"
    for one in all_.strimzi:
        if one["kind"] == "KafkaUser":
            for rule in one["spec"]["authorization"]["acls"]:
                if rule.get("type", "allow") != "allow":
                    yield f"{one['metadata']['name']} has a rule that denies: what is not given is refused anyway"


def broken(change: Callable[[Manifests], object]) -> Manifests:
    """The manifests with one thing changed."""
    changed = read()
    change(changed)
    return changed
