"""`dovetail-run serve`: its refusals before anything is loaded, and its life as a process."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import Result

PARROT = Path(__file__).parents[1] / "runtime" / "serve" / "conftest.py"
PROGRAM = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("parrot", {str(PARROT)!r})
parrot = sys.modules["parrot"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parrot)
from dovetail.runtime.cli.main import cli
cli.main(sys.argv[1:], obj=lambda pair, *, slots, queue, **_: parrot.make_engine(slots=slots, queue=queue))
"""
SLOW = {"messages": [{"role": "user", "content": "slow say " + "a" * 60}], "temperature": 0, "stream": True}


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--slots", "0"], "'--slots': 0"),
        (["--queue", "-1"], "'--queue': -1"),
        (["--timeout", "0"], "timeout 0"),
        (["--timeout", "nan"], "timeout nan"),
        (["--max-new-tokens", "0"], "new_tokens 0"),
        (["--max-body-bytes", "0"], "body_bytes 0"),
        (["--port", "70000"], "70000"),
        (["--api-key", "clé"], "API key"),
        (["--api-key", ""], "API key"),
        (["--cors", "nonsense"], "--cors 'nonsense' is no origin: give scheme, host and port"),
        (["--cors", "https://example.com/"], "is no origin"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--host", "." * 300], "cannot listen"),
        (["-m", "no-such-pair"], "no-such-pair"),
    ],
)
def test_refusals_before_the_model_is_loaded(
    invoke: Callable[..., Result], pair: Path, flags: list[str], message: str
) -> None:
    given = flags if "-m" in flags else ["-m", str(pair), *flags]
    result = invoke("serve", *given, obj=never)
    assert result.exit_code != 0
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_a_port_in_use(invoke: Callable[..., Result], pair: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = invoke("serve", "-m", str(pair), "--port", str(taken.getsockname()[1]), obj=never)
    assert result.exit_code == 7
    assert "in use" in result.stderr and "--port" in result.stderr and result.stderr.count("\n") == 1


def test_a_missing_extra(invoke: Callable[..., Result], pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = invoke("serve", "-m", str(pair), obj=never)
    assert result.exit_code == 2
    assert "'.[serve]'" in result.stderr and result.stderr.count("\n") == 1


def test_defaults_of_the_model(pair: Path) -> None:
    from dovetail.runtime.errors import IntegrityError
    from dovetail.runtime.serve.service import sampling_defaults

    assert sampling_defaults(pair / "target")["temperature"] == 1
    file = pair / "target" / "generation_config.json"
    file.write_text('{"temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": true}')
    found = sampling_defaults(pair / "target")
    assert (found["temperature"], found["top_p"], found["top_k"], found["min_p"]) == (0.6, 0.9, 20, 0)
    file.write_text('{"temperature": "hot"}')
    with pytest.raises(IntegrityError, match="temperature"):
        sampling_defaults(pair / "target")


@contextmanager
def served(pair: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A process that serves on a free port."""
    command = [sys.executable, "-c", PROGRAM, "serve", "-m", str(pair), "--port", "0", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            said = process.stderr.readline()
            found = re.search(r"http://\S+(?=/v1)", said)
            assert found, said + process.stderr.read()
            with httpx.Client(base_url=found[0], trust_env=False, timeout=20) as client:
                for _ in range(500):
                    try:
                        client.get("/health")
                        break
                    except httpx.ConnectError:
                        time.sleep(0.02)
                yield process, client
        finally:
            process.kill()


def test_sigterm_finishes_what_runs(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOVETAIL_API_KEY", "s3cret")
    with served(pair, "--served-model-name", "mine") as (process, client):
        assert client.get("/v1/models").status_code == 401
        client.headers["authorization"] = "Bearer s3cret"
        assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
        with client.stream("POST", "/v1/chat/completions", json=SLOW) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2:-1] == ["data: [DONE]"]
        assert process.wait(60) == 0


def test_a_second_signal_ends_at_once(pair: Path) -> None:
    with served(pair) as (process, client), client.stream("POST", "/v1/chat/completions", json=SLOW) as reply:
        lines = reply.iter_lines()  # a reader that is dropped closes the connection
        next(lines)
        process.send_signal(signal.SIGINT)
        while client.get("/health").status_code != 503:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", 403), ("localhost", 403), ("0.0.0.0", 200)])
def test_a_loopback_address_refuses_other_names(pair: Path, host: str, status: int) -> None:
    with served(pair, "--host", host) as (_, client):
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers={"host": "page.example"}).status_code == status
