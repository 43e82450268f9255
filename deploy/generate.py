"""Write the manifests that say again what stands elsewhere, so that it is written once: `python deploy/generate.py [--check]`.

- `kubernetes/base/prometheus-rule.yaml`: the alert rules of `prometheus/rules.yml`, as the Prometheus operator takes them;
- `kubernetes/example/catalogue.toml`: the example catalogue;
- `strimzi/topics.yaml`: the topics as `credits topics` makes them.

With `--check` nothing is written: each file that differs is named, and the exit status is 1.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

from workers.settings import Settings
from workers.topics import TOPICS, topic_settings

DEPLOY = Path(__file__).resolve().parent
HEAD = "# Written by `python deploy/generate.py` from {source}: change that.\n"


def manifests() -> dict[str, str]:
    """Every generated file's text, by its path under `deploy/`."""
    return {
        "kubernetes/base/prometheus-rule.yaml": _prometheus_rule(),
        "kubernetes/example/catalogue.toml": (
            DEPLOY.parent / "schemas" / "catalogue.example.toml"
        ).read_text(encoding="utf-8"),
        "strimzi/topics.yaml": _topics(),
    }


def _prometheus_rule() -> str:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text(encoding="utf-8"))
    return HEAD.format(source="deploy/prometheus/rules.yml") + _render(
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": "credits"},
            "spec": {"groups": rules["groups"]},
        }
    )


def _topics() -> str:
    """A cluster for money has three brokers; what follows from that is the code's to say."""
    settings = Settings.model_construct(replication_factor=3)
    documents = [
        {
            "apiVersion": "kafka.strimzi.io/v1",
            "kind": "KafkaTopic",
            "metadata": {"name": name, "labels": {"strimzi.io/cluster": "kafka"}},
            "spec": {
                "partitions": settings.partitions,
                "replicas": settings.replication_factor,
                "config": {
                    option: _number(value)
                    for option, value in topic_settings(name, settings).items()
                },
            },
        }
        for name in TOPICS
    ]
    return HEAD.format(source="src/workers/topics.py") + "---\n".join(map(_render, documents))


def _number(value: str) -> int | str:
    return int(value) if value.isdigit() else value


def _render(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document, sort_keys=False, width=160, allow_unicode=True)


def main(arguments: list[str]) -> int:
    """Write the files, or only compare them; the exit status."""
    different = []
    for name, text in manifests().items():
        path = DEPLOY / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        different.append(name)
        if arguments != ["--check"]:
            path.write_text(text, encoding="utf-8")
    for name in different:
        told = "differs from what it is made from: run `python deploy/generate.py`"
        sys.stdout.write(f"deploy/{name} {told if arguments == ['--check'] else 'was written'}\n")
    return 1 if different and arguments == ["--check"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
