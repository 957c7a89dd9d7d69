"""The Ray Serve application: fronts that take requests in, and replicas that answer them."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.types import Message

from dovetail.runtime.async_engine import AsyncEngine
from dovetail.runtime.drafter.vram import parse_size
from dovetail.runtime.errors import DeviceError, QueueFull
from dovetail.runtime.pair.known import resolve_draft_model, resolve_pair
from dovetail.runtime.pair.layout import TARGET
from dovetail.runtime.pair.manifest import read_manifest
from dovetail.runtime.serve.app import make_app
from dovetail.runtime.serve.ray.relay import Asked, Relay, ReplicaLost, answer_in
from dovetail.runtime.serve.ray.settings import Settings
from dovetail.runtime.serve.service import Service, sampling_defaults

# Ray's router hashes the session onto a ring of replicas: few sessions move when a replica comes or goes.
_ROUTER = RequestRouterConfig(request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter")
_CONNECTIONS = 4096  # requests that a front has open; they wait for replicas


class Replica:
    """One engine and its application."""

    def __init__(self, settings: Settings) -> None:
        pair = resolve_pair(settings.pair)
        engine = AsyncEngine.from_pretrained(
            pair,
            slots=settings.slots,
            queue=settings.queue,
            kv_cache=None if settings.kv_cache is None else parse_size(settings.kv_cache),
            threads=settings.cpus,
            vram=None if settings.vram is None else parse_size(settings.vram),
            gpu_layers=settings.gpu_layers,
            ov_config=settings.ov_config,
            draft_model=None if settings.draft_model is None else resolve_draft_model(settings.draft_model),
        )
        name = settings.served_model_name or read_manifest(pair).name
        self._service = Service(engine, name, settings.limits, sampling_defaults(pair / TARGET))
        self._app = make_app(self._service, api_key=settings.api_key)

    async def ask(self, asked: Asked) -> AsyncGenerator[Message, None]:
        """Yield the ASGI messages of the reply."""
        async for message in answer_in(self._app, asked):
            yield message

    def check_health(self) -> None:
        """Ray calls this, and replaces a replica whose engine has failed."""
        if self._service.ending:
            raise DeviceError("the engine has ended")

    async def __del__(self) -> None:
        """Ray calls this after the last answer."""
        if service := getattr(self, "_service", None):
            await service.engine.close()


class Handle:
    """Replicas behind a handle of Ray."""

    def __init__(self, handle: DeploymentHandle[Replica]) -> None:
        self._handle = handle

    async def ask(self, asked: Asked, session: str) -> AsyncGenerator[Message, None]:
        """Yield the ASGI messages of one replica's reply. Raises ReplicaLost, QueueFull."""
        stream = self._handle.options(stream=True, session_id=session).ask.remote(asked)
        try:
            async for message in stream:
                yield message
        except RayActorError as error:
            raise ReplicaLost from error
        except BackPressureError:
            raise QueueFull("too many requests wait for a replica: ask again later") from None
        finally:
            stream.cancel()  # nothing, after the last message


class Front:
    """Takes requests in for the replicas."""

    def __init__(self, replicas: DeploymentHandle[Replica], most_bytes: int) -> None:
        self._relay = Relay(Handle(replicas), most_bytes)

    def __serve_build_asgi_app__(self) -> Relay:
        return self._relay


def build(settings: Settings) -> serve.Application:
    """Return the application: fronts bound to replicas."""
    replicas = serve.deployment(
        Replica,
        name="replicas",
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.slots,
        ),
        max_ongoing_requests=settings.slots,
        max_queued_requests=settings.queue,
        request_router_config=_ROUTER,
    )
    front = serve.deployment(
        serve.ingress()(Front),
        name="front",
        num_replicas=settings.fronts,
        max_ongoing_requests=_CONNECTIONS,
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(replicas.bind(settings), settings.max_body_bytes)
