"""What a user says about the replicas: arguments of `serve run`, or environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dovetail.runtime.batch_engine import MOST, QUEUE, SLOTS
from dovetail.runtime.drafter.vram import parse_size
from dovetail.runtime.errors import InputError
from dovetail.runtime.serve.service import Limits
from dovetail.runtime.target.layers.choose import check_layers
from dovetail.runtime.target.properties import kv_properties, parse_properties

PREFIX = "DOVETAIL_RAY_"  # of the variable for each field, such as DOVETAIL_RAY_MAX_REPLICAS


class Settings(BaseModel):
    """The settings of all replicas. Names and defaults are those of `dovetail-run serve`.

    cpus: cores of a replica, which its engine uses all. gpus: a share of a GPU for the drafter and first layers.
    fronts: processes that take requests in. Ray runs from min_replicas to max_replicas replicas.
    """

    model_config = ConfigDict(extra="forbid")

    pair: str | None = None
    served_model_name: str | None = None
    min_replicas: int = Field(1, ge=1, le=4096)
    max_replicas: int = Field(1, ge=1, le=4096)
    fronts: int = Field(1, ge=1, le=4096)
    cpus: int = Field(1, ge=1, le=4096)
    gpus: float = Field(0, ge=0, le=64)
    slots: int = Field(SLOTS, ge=1, le=MOST)
    queue: int = Field(QUEUE, ge=1, le=MOST)
    kv_cache: str | None = None
    draft_model: str | None = None
    vram: str | None = None
    gpu_layers: str | None = None
    ov_config: dict[str, str] = Field(default_factory=dict)
    api_key: str | None = None
    timeout: float | None = None
    max_new_tokens: int | None = None
    max_prompt_tokens: int | None = None
    max_body_bytes: int = 4 << 20

    @model_validator(mode="before")
    @classmethod
    def _add_environment(cls, given: Any) -> Any:
        """Add what the environment says about fields that are not given."""
        if not isinstance(given, Mapping):
            return given
        variables = {name: os.environ.get(f"{PREFIX}{name.upper()}") for name in cls.model_fields}
        return {**{name: value for name, value in variables.items() if value is not None}, **given}

    @field_validator("ov_config", mode="before")
    @classmethod
    def _parse_properties(cls, given: Any) -> Any:
        """Take NAME=VALUE with commas between: arguments of `serve run`, and variables, are texts."""
        return parse_properties("ov_config", given.split(",")) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise InputError(
                f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}: raise max_replicas"
            )
        for size in (self.kv_cache, self.vram):
            if size is not None:
                parse_size(size)
        kv_properties(self.ov_config)
        check_layers(self.gpu_layers, "auto", None if self.vram is None else parse_size(self.vram))
        _ = self.limits
        return self

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Return the settings of `serve run`'s arguments. Raises InputError."""
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise InputError(f"{name} {first['input']!r:.60}: {first['msg']}: correct it") from None

    @property
    def limits(self) -> Limits:
        return Limits(self.max_body_bytes, self.max_prompt_tokens, self.max_new_tokens, self.timeout)
