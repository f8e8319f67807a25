"""No secret survives `redact`; nothing else is touched."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.redact import REDACTED, failure_message, is_secret_name, redact, redact_arguments, redact_text

SECRET_NAMES = [
    "password",
    "db_password",
    "tracking.password",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "hf_token",
    "hfToken",
    "authtoken",
    "access-token",
    "api_key",
    "apikey",
    "wandb.api-key",
    "AWS_SECRET_ACCESS_KEY",
    "APIKey",
    "client_secret",
    "secrets",
    "credentials",
    "passphrase",
    "dbpassword",
    "--hub-token",
]
PLAIN_NAMES = [
    "tokens",
    "tokens_per_second",
    "flops_per_token",
    "max_new_tokens",
    "tokenizer",
    "tokenizer.sha256",
    "eos_token_id",
    "pad_token",
    "model.num_key_value_heads",
    "optimizer.learning_rate",
    "keep_last",
    "monkey",
    "author",
    "",
]
URLS = [
    ("http://alice:hunter2@host:5000/x", "http://***@host:5000/x"),
    ("https://hunter2@host", "https://***@host"),
    ("postgresql+psycopg://u:hun%40ter2@db/mlflow", "postgresql+psycopg://***@db/mlflow"),
    ("postgresql://u:hunter2/3@db/mlflow", "postgresql://***@db/mlflow"),
    ("mysql://u:hun@ter2@db/mlflow", "mysql://***@db/mlflow"),
    ("http://host/a?user=bob&api_key=hunter2&x=1", "http://host/a?user=bob&api_key=***&x=1"),
    ("API request to http://u:hunter2@h:1/api failed", "API request to http://***@h:1/api failed"),
    ("http://host:5000/path", "http://host:5000/path"),
    ("sqlite:////srv/runs/mlflow.db", "sqlite:////srv/runs/mlflow.db"),
    ("write to someone@example.org", "write to someone@example.org"),
]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_what_stands_under_a_secret_name_is_replaced(name: str) -> None:
    assert is_secret_name(name)
    assert redact({name: "hunter2", "other": 1}) == {name: REDACTED, "other": 1}
    assert redact({name: ["hunter2"]}) == {name: REDACTED}


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_other_names_keep_their_values(name: str) -> None:
    assert redact({name: "value"}) == {name: "value"}


@pytest.mark.parametrize(("text", "expected"), URLS)
def test_urls_lose_their_secrets_wherever_they_stand(text: str, expected: str) -> None:
    assert redact_text(text) == expected
    assert redact({"a": [{"b": text}]}) == {"a": [{"b": expected}]}


def test_none_and_booleans_hold_no_secret() -> None:
    assert redact({"token": None, "use_auth": True}) == {"token": None, "use_auth": True}


def test_command_lines() -> None:
    line = ["train.py", "--hub-token", "hunter2", "a.api_key=hunter2", "--password=hunter2", "uri=http://u:hunter2@h"]
    line += ["--token", "--verbose", "data.path=x=y"]
    assert redact_arguments(line) == [
        *["train.py", "--hub-token", "***", "a.api_key=***", "--password=***", "uri=http://***@h"],
        *["--token", "--verbose", "data.path=x=y"],
    ]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from([url for url, _ in URLS]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(SECRET_NAMES + PLAIN_NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(values)
def test_redacting_twice_is_redacting_once_and_no_password_is_left(value: object) -> None:
    once = redact(value)
    assert redact(once) == once
    assert "hunter2" not in repr(once)


@given(
    st.from_regex(r"[a-z][a-z0-9+]{0,8}", fullmatch=True),
    st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="-._~!$&()*+,;=%"), min_size=1),
)
def test_no_user_information_survives_in_a_url(scheme: str, password: str) -> None:
    assert redact_text(f"{scheme}://user:{password}@host/path") == f"{scheme}://***@host/path"


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            "API request to http://h/api failed with exception HTTPConnectionPool(host='h', port=5055): Max retries "
            "exceeded with url: /api?run_id=x (Caused by NewConnectionError(\"HTTPConnection(host='h', port=5055): "
            'Failed to establish a new connection: [Errno 111] Connection refused"))',
            "no answer from h:5055: Connection refused",
        ),
        ("HTTPConnectionPool(host='h', port=80): Read timed out. (read timeout=10)", "no answer from h:80: timed out"),
        (
            "HTTPSConnectionPool(host='h', port=443): Max retries exceeded with url: /x (Caused by ResponseError('too "
            "many 503 error responses'))",
            "no answer from h:443: ResponseError",
        ),
    ],
)
def test_a_server_that_does_not_answer_is_a_short_line(said: str, line: str) -> None:
    assert failure_message(RuntimeError(said)) == line
