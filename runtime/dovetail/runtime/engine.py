"""The embeddable front: a pair folder or a pair of sessions, text in, text out."""

from __future__ import annotations

from collections import abc
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

from dovetail.runtime.drafter.session import Drafter
from dovetail.runtime.errors import ContextOverflow, InputError
from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import GenerationMetrics, Meter
from dovetail.runtime.loop.rescore import Choice, read_again
from dovetail.runtime.loop.sequence import FinishReason, Request, Sequence, Step
from dovetail.runtime.policy.choose import BOUNDS
from dovetail.runtime.policy.estimates import MAX_SLOWDOWN
from dovetail.runtime.policy.policy import Policy
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.system.progress import Progress, silent
from dovetail.runtime.target.session import Target
from dovetail.runtime.text.encoding import Detokenizer, Prompt, TextTokenizer, encode_prompt
from dovetail.runtime.text.stop_strings import StopFilter, check_stop_strings
from dovetail.runtime.tree.limits import TreeLimits

_RUNNING = "another generation of this engine is running: end or close its stream first"


class SamplingOptions(TypedDict, total=False):
    """Fields of SamplingParams, where their defaults are."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer: one round's tokens, and the text that is certain by now (it may be empty).

    finish_reason, metrics: on the last chunk. "stop": a stop token or stop string, "length": no room for more.
    seed: the one in use, drawn if none was given; None when greedy.
    """

    text: str
    token_ids: tuple[int, ...]
    seed: int | None = None
    finish_reason: FinishReason | None = None
    metrics: GenerationMetrics | None = None


@dataclass(frozen=True)
class GenerationResult:
    """A whole answer. text: without the stop string; token_ids: all that were decoded for it, no stop token."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int | None
    metrics: GenerationMetrics


class Engine:
    """Generates text with a target and, where there is one, a drafter; keeps the KV of the last conversation.

    One generation runs at a time. An abandoned stream, by Ctrl-C too, leaves the engine usable.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        tokenizer: TextTokenizer,
        *,
        tree: TreeLimits | None = None,
        scheduler: Policy | None = None,
        stop_tokens: Iterable[int] | None = None,
    ) -> None:
        """tree: default limits. scheduler: shapes each tree within them, None lets trees grow as far as they say.

        stop_tokens: default the tokenizer's end-of-sequence ids.
        """
        self.tokenizer = tokenizer
        self.tree = tree or (BOUNDS if scheduler else TreeLimits())
        self.scheduler = scheduler
        self.stop_tokens = frozenset(tokenizer.eos_token_ids if stop_tokens is None else stop_tokens)
        self.target_device = target.device
        self._drafter = drafter
        self.max_context = target.max_context
        self._sequence: Sequence | None = Sequence(target, drafter)
        self._busy = Lock()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        drafter_device: str = "auto",
        vram: str | int | None = None,
        fit: bool = False,
        threads: int | None = None,
        tree: TreeLimits | None = None,
        ov_config: Mapping[str, str] | None = None,
        exact: bool = True,
        max_slowdown: float = MAX_SLOWDOWN,
        progress: Progress = silent,
    ) -> Self:
        """Open a pair folder: every file is checked before a weight is loaded.

        drafter_device: "cuda", "cpu", or "auto" for CUDA where it works; a GPU that fails later is left for the CPU,
        with a warning in the log. vram: bytes of it that the drafter may take, or "3GB", None for what the pair says;
        fit: its context may shrink to that. threads: of each engine, None for theirs.
        tree: every tree grows to these limits; None shapes each by what it costs and is worth here, for which the
        machine is measured once, in seconds; `progress` receives how far that is.
        ov_config: properties of OpenVINO's CPU plugin for the target, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}.
        exact: a text is the same tokens with any tree and with none; False lets plain passes run through OpenVINO's
        kernel for single rows, which is quicker and rounds otherwise.
        max_slowdown: share of the time, 0 to 1, that drafts may lose against plain decoding in the long run.
        Raises PairError, DeviceError, InputError.
        """
        from dovetail.runtime.drafter.vram import parse_size
        from dovetail.runtime.load import LoadOptions, load

        room = parse_size(vram) if isinstance(vram, str) else vram
        options = LoadOptions(drafter_device, room, fit, threads, tree, ov_config or {}, exact, max_slowdown)
        parts = load(Path(path), options, progress)
        return cls(
            parts.target,
            parts.drafter,
            parts.tokenizer,
            tree=parts.tree,
            scheduler=parts.scheduler,
            stop_tokens=parts.stop_tokens,
        )

    @property
    def drafter_device(self) -> str | None:
        """Where the drafter runs; a GPU that fails in the middle of a text is left for the CPU."""
        return self._drafter.device if self._drafter else None

    @property
    def drafter_note(self) -> str | None:
        """Why it runs there, where it says so."""
        return (self._drafter.report.note or None) if self._drafter else None

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        *,
        stop: str | abc.Sequence[str] = (),
        speculate: bool = True,
        raw: bool = False,
        template_options: Mapping[str, Any] | None = None,
        parse_special: bool = False,
        tree: TreeLimits | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> GenerationResult:
        """The whole answer to `prompt`; arguments as for `stream`."""
        chunks = list(
            self.stream(
                prompt, max_new_tokens, stop=stop, speculate=speculate, raw=raw, template_options=template_options,
                parse_special=parse_special, tree=tree, **sampling,
            )
        )  # fmt: skip
        last = chunks[-1]
        assert last.finish_reason and last.metrics  # a stream that ran to its end
        return GenerationResult(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            finish_reason=last.finish_reason,
            seed=last.seed,
            metrics=last.metrics,
        )

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        *,
        stop: str | abc.Sequence[str] = (),
        speculate: bool = True,
        raw: bool = False,
        template_options: Mapping[str, Any] | None = None,
        parse_special: bool = False,
        tree: TreeLimits | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Generator[Chunk, None, None]:
        """The answer to `prompt`, chunk by chunk; close the generator, or drop it, to end it early.

        prompt: messages of a conversation, token ids, or a string: one user turn where the target has a chat
        template, the text itself with raw=True or without a template. template_options: what the chat template reads
        besides the messages, {"tools": [...], "enable_thinking": False}. parse_special: whether special tokens that
        messages or tools spell out act as such; False makes them text. stop: strings that end the answer.
        speculate: False decodes without drafting. tree: this answer's trees grow to these limits.
        sampling: see SamplingParams; a seed gives one text, whatever is drafted.
        Raises InputError at once for what cannot be used, ContextOverflow for a prompt that does not fit.
        """
        sequence, meter = self._open_sequence(), Meter()
        if tree is not None and not isinstance(tree, TreeLimits):
            raise InputError(f"tree {tree!r} is no TreeLimits: give e.g. TreeLimits(width=12)")
        stops = check_stop_strings(stop)
        request = Request(
            prompt=tuple(encode_prompt(self.tokenizer, prompt, raw, template_options, parse_special)),
            max_new_tokens=max_new_tokens,
            sampling=SamplingParams(**sampling).seeded(),
            stop_tokens=self.stop_tokens,
            limits=(tree or (self.tree if self._drafter else None)) if speculate else None,
            scheduler=self.scheduler if speculate and tree is None else None,
        )
        request.check_room(self.max_context)
        meter.lap("other")
        return self._run(sequence, request, StopFilter(stops), meter)

    def count_tokens(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        template_options: Mapping[str, Any] | None = None,
        parse_special: bool = False,
    ) -> int:
        """Tokens of `prompt` as `stream` takes it, template included. Raises as that does, ContextOverflow too."""
        tokens = encode_prompt(self.tokenizer, prompt, raw, template_options, parse_special)
        request = Request(tuple(tokens), max_new_tokens=1)
        request.check_room(self.max_context)
        return len(request.prompt)

    def choices(
        self,
        prompt: Prompt,
        answer: abc.Sequence[int],
        *,
        raw: bool = False,
        template_options: Mapping[str, Any] | None = None,
        parse_special: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Choice]:
        """What the target chooses in the place of each token of `answer`, token ids, when it reads them again.

        Its passes are chains of tokens, as wide as trees. sampling: as for the answer, with the seed that it had.
        This is the last conversation from then on. Raises InputError (no such ids, too), ContextOverflow.
        """
        sequence = self._open_sequence()
        tokens = encode_prompt(self.tokenizer, prompt, raw, template_options, parse_special)
        if (count := len(tokens) + len(answer)) > self.max_context:
            raise ContextOverflow(
                f"prompt and answer have {count} tokens, the context {self.max_context}: cut the answer"
            )
        if not self._busy.acquire(blocking=False):
            raise InputError(_RUNNING)
        try:
            return read_again(sequence, tokens, answer, Sampler(SamplingParams(**sampling).seeded()))
        finally:
            self._busy.release()

    def reset(self) -> None:
        """Forget the last conversation: the next prompt is read from its first token."""
        sequence = self._open_sequence()
        if not self._busy.acquire(blocking=False):
            raise InputError(_RUNNING)
        try:
            sequence.forget()
        finally:
            self._busy.release()

    def close(self) -> None:
        """Let go of the sessions and their memory; a stream that still runs keeps them until it ends."""
        (sequence, self._sequence), (drafter, self._drafter) = (self._sequence, None), (self._drafter, None)
        if sequence and self._busy.acquire(blocking=False):
            try:
                sequence.target.close(sequence.id)
                if drafter:
                    drafter.close()
            finally:
                self._busy.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open_sequence(self) -> Sequence:
        if self._sequence is None:
            raise InputError("this engine is closed: open another with Engine.from_pretrained")
        return self._sequence

    def _run(
        self, sequence: Sequence, request: Request, stops: StopFilter, meter: Meter
    ) -> Generator[Chunk, None, None]:
        if not self._busy.acquire(blocking=False):
            raise InputError(_RUNNING)
        try:
            meter.resume()
            text = _Text(self.tokenizer.detokenizer(), stops)
            with closing(decode(sequence, request, meter)) as steps:
                for step in steps:
                    meter.resume()
                    chunk = text.chunk(step, request.sampling.seed, meter)
                    yield chunk
                    if chunk.finish_reason:
                        return
        finally:
            self._busy.release()


class _Text:
    """From steps to chunks: detokenise, look for stop strings, say when it is over."""

    def __init__(self, detokenizer: Detokenizer, stops: StopFilter) -> None:
        self.detokenizer, self.stops = detokenizer, stops

    def chunk(self, step: Step, seed: int | None, meter: Meter) -> Chunk:
        pieces, used = list[str](), 0
        for token in step.tokens:
            pieces.append(self.stops.add(self.detokenizer.add(token)))
            used += 1
            if self.stops.stopped:
                break
        finish = step.finish
        if finish and not self.stops.stopped:
            pieces += [self.stops.add(self.detokenizer.flush()), self.stops.flush()]
        if self.stops.stopped:
            finish = "stop"
            meter.new_tokens -= len(step.tokens) - used
        meter.lap("other")
        return Chunk("".join(pieces), step.tokens[:used], seed, finish, meter.metrics() if finish else None)
