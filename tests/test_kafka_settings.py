"""What is said about Kafka must fit together: what would not be used, or could not, is refused at the start."""

from pathlib import Path
from typing import Any

import pytest

from secured.certificates import Authority
from workers.kafka import addresses, unprotected
from workers.settings import Settings, SettingsError, kafka_options
from workers.store.database import unverified

USER = {"kafka_sasl_username": "worker", "kafka_sasl_password": "a-secret"}


def refusal(**told: Any) -> str:
    """What a process that is told this ends with."""
    with pytest.raises(SettingsError) as error:
        kafka_options(Settings(kafka_bootstrap="kafka:9092", **told))
    assert "a-secret" not in str(error.value)
    return str(error.value)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """An authority, a certificate with its key, the key of another, and a file that is nothing of these."""
    authority = Authority("tests")
    identity = authority.issue("worker")
    texts = {
        "ca": authority.certificate,
        "cert": identity.certificate,
        "key": identity.key,
        "other": authority.issue("other").key,
        "nonsense": "nonsense",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return {name: tmp_path / name for name in (*texts, "missing")}


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (USER, "CREDITS_KAFKA_SASL_USERNAME is set, but CREDITS_KAFKA_SECURITY_PROTOCOL is PLAINTEXT, which asks for no user"),
        ({"kafka_sasl_password": "a-secret", "kafka_security_protocol": "SSL"}, "CREDITS_KAFKA_SASL_PASSWORD is set, but"),
        ({"kafka_security_protocol": "SASL_SSL"}, "CREDITS_KAFKA_SASL_USERNAME is not set"),
        ({"kafka_security_protocol": "SASL_SSL", "kafka_sasl_username": "worker"}, "CREDITS_KAFKA_SASL_PASSWORD is not set"),
        ({**USER, "kafka_security_protocol": "SASL_PLAINTEXT", "kafka_sasl_mechanism": "PLAIN"}, "would be readable on the network"),
        ({"kafka_ca_file": "/ca"}, "CREDITS_KAFKA_CA_FILE is set, but CREDITS_KAFKA_SECURITY_PROTOCOL is PLAINTEXT, which is not TLS"),
        ({"kafka_cert_file": "/c", **USER, "kafka_security_protocol": "SASL_PLAINTEXT"}, "CREDITS_KAFKA_CERT_FILE is set, but"),
        ({"kafka_key_file": "/key", "kafka_security_protocol": "SSL"}, "a key proves nothing without its certificate"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(told: dict[str, Any], sentence: str) -> None:
    """Somebody who set a password or an authority thinks that it protects him."""
    assert sentence in refusal(**told)


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"kafka_ca_file": "missing"}, "CREDITS_KAFKA_CA_FILE cannot be used: No such file or directory: "),
        ({"kafka_ca_file": "nonsense"}, "CREDITS_KAFKA_CA_FILE is no PEM, or not of one pair: "),
        ({"kafka_cert_file": "cert", "kafka_key_file": "missing"}, "(with CREDITS_KAFKA_KEY_FILE) cannot be used: "),
        ({"kafka_cert_file": "cert", "kafka_key_file": "other"}, "(with CREDITS_KAFKA_KEY_FILE) is no PEM, or not of one pair: "),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named(
    files: dict[str, Path], told: dict[str, str], sentence: str
) -> None:
    """With the variable that names it."""
    named = {name: files[value] for name, value in told.items()}

    assert sentence in refusal(kafka_security_protocol="SSL", **named)


def test_what_fits_together_is_what_every_client_gets(files: dict[str, Path]) -> None:
    """TLS that compares names and wants a certificate, the user and the password."""
    settings = Settings(
        kafka_bootstrap="kafka:9092",
        kafka_security_protocol="SASL_SSL",
        kafka_ca_file=files["ca"],
        kafka_cert_file=files["cert"],
        kafka_key_file=files["key"],
        **USER,
    )

    options = kafka_options(settings)
    context = options.pop("ssl_context")

    assert options == {
        "bootstrap_servers": "kafka:9092",
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "worker",
        "sasl_plain_password": "a-secret",
    }
    assert context.check_hostname
    assert context.verify_mode.name == "CERT_REQUIRED"
    assert [one["subject"] for one in context.get_ca_certs()] == [((("commonName", "tests"),),)]
    assert "a-secret" not in repr(settings)


@pytest.mark.parametrize(
    ("bootstrap", "protocol", "told"),
    [
        ("127.0.0.1:9092", "PLAINTEXT", False),
        ("localhost:9092,[::1]:9093", "PLAINTEXT", False),
        ("kafka:9092", "PLAINTEXT", True),
        ("127.0.0.1:9092,10.0.0.7:9092", "SASL_PLAINTEXT", True),
        ("kafka:9092", "SASL_SSL", False),
    ],
)
def test_a_way_that_others_can_listen_on_is_told(bootstrap: str, protocol: str, told: bool) -> None:
    """Only where there is a network between."""
    settings = Settings(kafka_bootstrap=bootstrap, kafka_security_protocol=protocol)

    assert (unprotected(settings) is not None) == told


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql://u:p@127.0.0.1/credits", False),
        ("postgresql:///credits", False),
        ("postgresql://u:p@db/credits", True),
        ("postgresql://u:p@db/credits?sslmode=require", True),
        ("postgresql://u:p@db/credits?sslmode=verify-full&sslrootcert=/ca", False),
    ],
)
def test_a_database_that_nothing_proves_is_told(url: str, told: bool) -> None:
    """TLS without the check of the certificate proves nothing."""
    assert (unverified(url) is not None) == told


def test_addresses_are_read_as_kafka_reads_them() -> None:
    """Several, with and without a port, and of both kinds."""
    assert addresses("a:1, b ,[::1]:2") == [("a", 1), ("b", 9092), ("::1", 2)]
