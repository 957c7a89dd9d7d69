"""`dovetail-run serve`: OpenAI's API on a port."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import click

from dovetail.runtime.batch_engine import MOST, QUEUE, SLOTS
from dovetail.runtime.cli.options import EngineFlags, engine_options, read_size
from dovetail.runtime.errors import INTERRUPTED, InputError, install_extra
from dovetail.runtime.pair.known import resolve_pair
from dovetail.runtime.pair.layout import TARGET
from dovetail.runtime.pair.manifest import read_manifest

KEY_VARIABLE = "DOVETAIL_API_KEY"
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")  # as browsers send it


@click.command(short_help="Answer OpenAI's API on a port.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all of them.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free port.")
@click.option("--served-model-name", metavar="NAME", help="Name of the model for clients.  [default: the pair's name]")
@click.option(
    "--slots",
    type=click.IntRange(1, MOST),
    default=SLOTS,
    show_default=True,
    help="Answers that share one pass at most.",
)
@click.option(
    "--queue",
    type=click.IntRange(0, MOST),
    default=QUEUE,
    show_default=True,
    help="Answers that may wait; then clients get 429.",
)
@click.option(
    "--kv-cache",
    callback=read_size,
    metavar="SIZE",
    help="Memory for the keys and values of all answers, "
    "e.g. 4GB.  [default: whole contexts in all slots, at most a quarter of the memory]",
)
@click.option("--api-key", envvar=KEY_VARIABLE, metavar="KEY", help="Key that clients send; better in "
              f"{KEY_VARIABLE}.  [default: everybody may ask]")  # fmt: skip
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Let web pages of this origin ask; '*' is any; "
              "repeatable.  [default: none]")  # fmt: skip
@click.option("--timeout", type=float, metavar="SECONDS", help="Time of a request, its wait in the queue "
              "included.  [default: no limit]")  # fmt: skip
@click.option("-n", "--max-new-tokens", type=int, help="Tokens that a request may ask for.  [default: the context]")
@click.option("--max-prompt-tokens", type=int, help="Tokens that a prompt may have.  [default: the context]")
@click.option("--max-body-bytes", type=int, default=4 << 20, show_default=True, help="Size of a request's body.")
@engine_options
@click.pass_context
def serve(
    ctx: click.Context,
    host: str,
    port: int,
    served_model_name: str | None,
    slots: int,
    queue: int,
    kv_cache: int | None,
    api_key: str | None,
    cors: tuple[str, ...],
    timeout: float | None,
    max_new_tokens: int | None,
    max_prompt_tokens: int | None,
    max_body_bytes: int,
    engine_flags: EngineFlags,
) -> None:
    """Answer OpenAI's API until a signal: chat completions, completions and responses.

    SIGTERM or Ctrl-C finishes the running answers, and refuses new ones. A second signal stops at
    once.
    """
    check_extra()
    from dovetail.runtime.async_engine import AsyncEngine
    from dovetail.runtime.serve.app import is_loopback, make_app
    from dovetail.runtime.serve.server import Server, bind
    from dovetail.runtime.serve.service import Limits, Service, sampling_defaults

    limits = Limits(max_body_bytes, max_prompt_tokens, max_new_tokens, timeout)
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise InputError(
            "the API key cannot be sent in a header: give printable ASCII characters without blanks around"
        )
    if wrong := [origin for origin in cors if origin != "*" and not ORIGIN.fullmatch(origin)]:
        raise InputError(
            f"--cors {wrong[0]!r:.80} is no origin: give scheme, host and port, e.g. https://example.com, or '*'"
        )
    pair = resolve_pair(engine_flags.pair)
    name, defaults = served_model_name or read_manifest(pair).name, sampling_defaults(pair / TARGET)
    bound = bind(host, port)
    opener: Callable[..., AsyncEngine] = ctx.obj or AsyncEngine.from_pretrained  # obj: of tests
    engine = engine_flags.open_with(opener, pair, slots=slots, queue=queue, kv_cache=kv_cache)
    service = Service(engine, name, limits, defaults)
    where, number = bound.getsockname()[:2]
    local = host if is_loopback(where) else None
    server = Server(make_app(service, api_key=api_key, cors=cors, local=local), service)
    url = f"http://{f'[{where}]' if ':' in where else where}:{number}/v1"
    devices = f"target {engine.target_device}, drafter {engine.drafter_device or 'none'}"
    click.echo(f"serving {name} at {url}; {devices}; Ctrl-C ends", err=True)
    if not asyncio.run(server.run_engine(bound)):
        ctx.exit(INTERRUPTED)


def check_extra() -> None:
    """Raise InputError if a package of the extra `serve` is missing."""
    try:
        import fastapi  # noqa: F401
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"serve needs packages that are missing ({error}): {install_extra('serve')}") from None
