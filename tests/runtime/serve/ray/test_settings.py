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


def test_properties_are_texts_or_a_mapping() -> None:
    """`serve run` gives texts; a configuration file of Ray Serve gives a mapping."""
    given = {"KV_CACHE_PRECISION": "u8", "KEY_CACHE_GROUP_SIZE": "16"}
    for way in (",".join(f"{name}={value}" for name, value in given.items()), given):
        assert Settings.of({"ov_config": way}).ov_config == given
    assert Settings.of({}).ov_config == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_replicas": "many"}, "max_replicas 'many'"),
        ({"replicas": "2"}, "replicas '2'"),
        ({"min_replicas": "3", "max_replicas": "2"}, "max_replicas 2 is below min_replicas 3"),
        ({"cpus": "0"}, "cpus '0'"),
        ({"kv_cache": "much"}, "size 'much' is unknown"),
        ({"timeout": "-1"}, "timeout -1"),
        ({"ov_config": "KV_CACHE_PRECISION"}, "ov_config 'KV_CACHE_PRECISION' is no property: give NAME=VALUE"),
        ({"ov_config": "KV_CACHE_PRECISION=u4"}, "KV_CACHE_PRECISION=u4 is not supported: give f16 or u8"),
        ({"gpu_layers": "auto"}, "--gpu-layers auto takes what is left of a limit"),
    ],
)
def test_a_bad_setting_is_one_line(given: dict[str, str], said: str) -> None:
    with pytest.raises(InputError) as told:
        Settings.of(given)
    assert said in str(told.value) and "\n" not in str(told.value)
