"""Settings come from arguments and the environment; a bad one is one line."""

from __future__ import annotations

import pytest

from dovetail.runtime.errors import InputError
from dovetail.runtime.serve.ray.settings import Settings


def test_arguments_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOVETAIL_RAY_MAX_REPLICAS", "3")
    monkeypatch.setenv("DOVETAIL_RAY_PAIR", "mine")
    monkeypatch.setenv("DOVETAIL_RAY_GPUS", "0.25")
    found = Settings.of({"pair": "yours", "timeout": "2.5"})  # `serve run` gives texts
    assert (found.pair, found.max_replicas, found.min_replicas, found.gpus) == ("yours", 3, 1, 0.25)
    assert found.limits.timeout_s == 2.5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_replicas": "many"}, "max_replicas 'many'"),
        ({"replicas": "2"}, "replicas '2'"),
        ({"min_replicas": "3", "max_replicas": "2"}, "max_replicas 2 is below min_replicas 3"),
        ({"cpus": "0"}, "cpus '0'"),
        ({"kv_cache": "much"}, "size 'much' is unknown"),
        ({"timeout": "-1"}, "timeout -1"),
        ({"gpu_layers": "auto"}, "--gpu-layers auto takes what is left of a limit"),
    ],
)
def test_a_bad_setting_is_one_line(given: dict[str, str], said: str) -> None:
    with pytest.raises(InputError) as told:
        Settings.of(given)
    assert said in str(told.value) and "\n" not in str(told.value)
