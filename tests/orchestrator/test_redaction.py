"""Secrets: known ones are taken out of every text, and a whole run leaves none anywhere."""

import base64
import contextlib
import html
import io
import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import markupsafe
import mlflow
import pytest
import yaml
from mlflow import MlflowClient

from moesaic.orchestrator import cli, redaction
from moesaic.orchestrator.console import stderr
from moesaic.orchestrator.errors import UserError
from moesaic.orchestrator.files import write_json
from moesaic.orchestrator.mlflow_text import one_line, place
from moesaic.orchestrator.objects import _reason
from moesaic.orchestrator.redaction import clean_streams, keep_secret, redacted, redacted_tree
from tests.orchestrator.inline import Project
from tests.orchestrator.projects import make_model_folder

HF = "hf_" + "abcDEF1234567890abcDEF1234567890ab"
AWS = "AKIA" + "IOSFODNN7EXAMPLE"


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_known", set())


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("at http://user:pass@host:5000/x", "at http://user:***@host:5000/x"),
        ("postgresql+psycopg://u:p@ss/w@host/db", "postgresql+psycopg://u:***@host/db"),
        (f"s3://{AWS}:a/b+c@bucket/key", "s3://***:***@bucket/key"),
        ("git+https://sometoken@github.com/a/b", "git+https://***@github.com/a/b"),
        ("https://b/k?X-Amz-Signature=ab12&part=3", "https://b/k?X-Amz-Signature=***&part=3"),
        ("x?a=1&access_token=abc#f", "x?a=1&access_token=***#f"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic ***"),
        ('{"Authorization": "Bearer abcdefgh"}', '{"Authorization": "Bearer ***"}'),
        (f"token {HF}, id {AWS}.", "token ***, id ***."),
        ("x" * 50 + "://u:pass@host", "x" * 50 + "://u:***@host"),
        ("a@b=http://u:pass@h,http://u:p2@h x@y", "a@b=http://u:***@h x@y"),
        ("'http://u:p@h' <ftp://u:q@h>b@c", "'http://u:***@h' <ftp://u:***@h>b@c"),
    ],
)
def test_what_is_secret_by_its_form_is_taken_out_once(text: str, clean: str) -> None:
    assert redacted(text) == clean
    assert redacted(clean) == clean


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000/path/user@version",
        "abfs://container@account.dfs.core.windows.net/x",
        "hdfs://user@host/x",
        "ray://host:10001",
        "sqlite:////runs/mlflow.db",
        "memory://store",
        "a basic understanding of the bearer of news",
        "tokens: 400, hf_model, model?bits=3",
        "model.layers.0.mlp: 3 of 4",
    ],
)
def test_what_is_not_secret_stays(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "RAY_AUTH_TOKEN", "DB_PASSWORD"]
    + ["MLFLOW_TRACKING_PASSWORD", "AZURE_STORAGE_CONNECTION_STRING", "OPENAI_API_KEY"]
    + ["PGPASSWORD", "MYSQL_PWD", "SSHPASS", "DB_PASS", "GITHUBTOKEN", "SIGNING_PRIVATE_KEY"],
)
def test_values_of_secret_variables_are_taken_out(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "correct horse/9")
    assert redacted("it is 'correct horse/9'") == "it is '***'"


def test_nested_values_are_cleaned_in_keys_and_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "correct horse/9")
    keep_secret("s3://key:battery-staple@bucket")
    given = {"correct horse/9": [1, ("battery-staple", None)], 3: {"a": f"with {HF}", "b": 0.5}}
    wanted = {"***": [1, ["***", None]], "3": {"a": "with ***", "b": 0.5}}
    assert redacted_tree(given) == wanted


def test_names_of_a_plan_stay_and_what_stands_beside_them_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_TOKEN", "self_attn.q_proj")
    units = {"model.layers.0.self_attn.q_proj": [{"method": "rtn"}]}
    write_json(tmp_path / "plan.json", {"units": units, "why": "of self_attn.q_proj"})
    cli._print_json({"plan": {"units": units}, "why": ["self_attn.q_proj"]})
    assert json.loads((tmp_path / "plan.json").read_text()) == {"units": units, "why": "of ***"}
    assert json.loads(capsys.readouterr().out) == {"plan": {"units": units}, "why": ["***"]}


@pytest.mark.parametrize(
    "part",
    ["a", "a://", "a://b:", "a://b:1/", "a://b@", "://", "a:", "@", "?", "?token", "bearer ", "sk-"]
    + ["authorization:", "hf_", "x" * 40 + "://a:", "eyJ.a-b+c/"],
)
@pytest.mark.parametrize("around", ["{}", "x://{}", "{}://", "{}@", "?{}", "authorization: {}"])
def test_time_grows_as_texts_do(around: str, part: str) -> None:
    """Squared, eight times the text would take 64 times as long."""

    def seconds(count: int) -> float:
        text, best = around.format(part * (count // len(part))), math.inf
        for _ in range(3):
            begun = time.process_time()
            redacted(text)
            best = min(best, time.process_time() - begun)
        return best

    assert seconds(32_000) < 24 * seconds(4_000) + 0.005


@pytest.mark.parametrize(
    "name",
    ["TOKENIZERS_PARALLELISM", "AWS_WEB_IDENTITY_TOKEN_FILE", "PWD", "OLDPWD", "COMPASS", "KEY"],
)
def test_values_of_other_variables_stay(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "/run/something")
    assert redacted("in /run/something") == "in /run/something"


ODD = """o"d<d>'s\\ &/pass wörd"""


@pytest.mark.parametrize(
    "write",
    [
        json.dumps,
        lambda text: json.dumps(text, ensure_ascii=False),
        lambda text: yaml.safe_dump([text], allow_unicode=True),
        lambda text: yaml.safe_dump([text], allow_unicode=True, default_style="'"),
        lambda text: yaml.safe_dump([text], allow_unicode=True, default_style='"'),
        repr,
        quote,
        lambda text: quote(text, safe=""),
        html.escape,
        lambda text: html.escape(text, quote=False),
        lambda text: str(markupsafe.escape(text)),
        lambda text: str(markupsafe.escape(json.dumps({"a": text}))),
    ],
)
def test_a_secret_is_taken_out_however_it_is_written(
    monkeypatch: pytest.MonkeyPatch, write: Callable[[str], str]
) -> None:
    monkeypatch.setenv("PGPASSWORD", ODD)
    written = write(f"before {ODD} after")
    clean = redacted(written)
    assert "***" in clean and "before" in clean and "after" in clean
    assert not [part for part in ("pass", "rd", "d<d", "lt;") if part in clean], clean


def test_json_stays_json_without_a_secret_that_ends_in_a_backslash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGPASSWORD", "pass\\word\\")
    assert json.loads(redacted(json.dumps({"a": "pass\\word\\"}))) == {"a": "***"}


def test_a_secret_of_several_lines_is_taken_out_line_by_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SIGNING_PRIVATE_KEY", "-----BEGIN-----\nMIIEvQIBADANB\n----END----\n")
    assert redacted("found MIIEvQIBADANB there") == "found *** there"


def test_what_is_printed_is_cleaned_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "correct horse/9")
    with open(os.devnull, "w", encoding="utf-8") as stream:
        written: list[str] = []
        monkeypatch.setattr(stream, "write", lambda text: written.append(text))
        monkeypatch.setattr(redaction.sys, "stdout", stream)
        monkeypatch.setattr(redaction.sys, "stderr", io.StringIO())
        clean_streams()
        print("it is correct", end=" ")
        print("horse/9", "and", "more\nbeg", end="", flush=True)
        stream.writelines(["un\n", "end"])
        stream.flush()
    assert "".join(written) == "it is *** and more\nbegun\nend"


def test_a_password_that_was_seen_in_an_address_is_taken_out_alone() -> None:
    keep_secret("https://me:pass%2Fword9@host")
    assert redacted("401: pass%2Fword9, pass/word9") == "401: ***, ***"


def test_an_address_that_lost_its_secret_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^tracking\.uri: .*its secret was taken out: put it in"):
        place("http://user:***@host:5000", tmp_path)


def test_lines_errors_and_json_of_the_command_line_hold_no_secret(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work() -> Any:
        raise ValueError(f"no {HF} at https://me:passwort1@host")

    with pytest.raises(cli.typer.Exit):
        cli._answer(work, True, True)
    stderr.print(f"at {HF}")
    written = capsys.readouterr()
    for text in written:
        assert HF not in text and "passwort1" not in text
    assert "Traceback" in written.err and json.loads(written.out)["exit"] == 1


# A whole run, the record being kept by a server that wants a password.

USER, PASSWORD = "moe", "s3cr3t-p4ssw0rd"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """MLflow's own server behind basic authentication: address with password, database."""
    from mlflow.server import app, handlers
    from werkzeug.serving import make_server

    database = tmp_path / "server.db"
    handlers.initialize_backend_stores(
        f"sqlite:///{database}", default_artifact_root=(tmp_path / "artifacts").as_uri()
    )
    wanted = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    def guarded(environ: dict[str, Any], start: Any) -> Any:
        if environ.get("HTTP_AUTHORIZATION") != wanted:
            start("401 Unauthorized", [("Content-Type", "text/plain")])
            return [b"who are you?"]
        return app(environ, start)

    listening = make_server("127.0.0.1", 0, guarded, threaded=True)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://{USER}:{PASSWORD}@127.0.0.1:{listening.server_port}", database
    listening.shutdown()
    mlflow.set_tracking_uri(None)  # the server made its database the default of the process
    monkeypatch.setattr(handlers, "_tracking_store", None)
    monkeypatch.setattr(handlers, "_model_registry_store", None)


def test_a_run_whose_addresses_hold_secrets_leaves_none_of_them(
    tmp_path: Path,
    server: tuple[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    uri, database = server
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    folder = tmp_path / "project"
    project = Project(folder, make_model_folder(tmp_path / "model"), monkeypatch)
    project.write(
        tracking={"uri": uri, "register_as": "small"},
        compute={"address": f"ray://{HF}@127.0.0.1:10001"},
        # Names that hold a token, and what the environment says is secret.
        evaluation={"texts": [{"file": "held-out.txt", "name": f"{AWS} {'0123456789abcdef' * 4}"}]},
    )
    result, _ = project.run(stages=("evaluate", "assemble", "report"))
    cli._print_json(result)
    stderr.print(f"MLflow {result['tracking_uri']}")

    secrets = [PASSWORD, HF, AWS, "0123456789abcdef" * 4]
    secrets.append(base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode())
    written = [*project.output.rglob("*"), *(tmp_path / "artifacts").rglob("*"), database]
    files = [path for path in written if path.is_file()]
    names = {path.name for path in files}
    assert {"recipe.yaml", "log.txt", "README.md", "report.html", "mlflow_run.json"} <= names
    for path in files:
        content = path.read_bytes()
        found = [secret for secret in secrets if secret.encode() in content]
        assert not found, (path, found)
    for text in capfd.readouterr():
        assert not [secret for secret in secrets if secret in text]

    # And the record is complete.
    client = MlflowClient(uri)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT DISTINCT status FROM runs").fetchall()
    assert rows == [("FINISHED",)]
    assert [model.name for model in client.search_registered_models()] == ["small"]
    assert f"{USER}:***@127.0.0.1" in (project.output / "recipe.yaml").read_text()


def test_what_is_cut_off_is_cleaned_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a secret is none that anybody knows, but tells half of it."""
    monkeypatch.setenv("DEMO_TOKEN", secret := "correct-horse-battery-staple")
    for tell, length in ((one_line, 500), (_reason, 200)):
        for shift in range(60):
            text = tell(OSError("x" * (length - shift) + secret))
            assert secret[:8] not in text
