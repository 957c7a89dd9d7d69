"""The embeddable front: a pair folder or a pair of sessions, text in, text out."""

from __future__ import annotations

from collections import abc
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Self, Unpack

from dovetail.runtime.drafter.session import Drafter
from dovetail.runtime.errors import ContextOverflow, InputError
from dovetail.runtime.front import Answer, Ask, Chunk, Front, GenerationResult, RequestOptions, SamplingOptions
from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.loop.rescore import Choice, read_again
from dovetail.runtime.loop.sequence import Sequence
from dovetail.runtime.policy.choose import BOUNDS, Scheduler
from dovetail.runtime.policy.policy import Policy
from dovetail.runtime.sampling.constraint import Constraint
from dovetail.runtime.sampling.params import SamplingParams
from dovetail.runtime.sampling.sampler import Sampler
from dovetail.runtime.system.progress import Progress, silent
from dovetail.runtime.target.session import Target
from dovetail.runtime.text.encoding import Prompt, TextTokenizer, encode_prompt
from dovetail.runtime.tree.limits import TreeLimits
from dovetail.runtime.tree.repeats import check_lookup_cache


class Engine:
    """Generates text with a target and perhaps a drafter. Keeps the last conversation's KV.

    One generation runs at a time. A stream that ends early, e.g. by Ctrl-C, harms nothing.
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
        lookup_cache: int = 0,
    ) -> None:
        """tree: default limits. scheduler: shapes trees within them; None lets trees grow to them.

        stop_tokens: default the tokenizer's end-of-sequence ids. lookup_cache: see from_pretrained.
        """
        check_lookup_cache(lookup_cache)
        limits = tree or (BOUNDS if scheduler else TreeLimits())
        self._front = Front(tokenizer, target.max_context, limits, scheduler, stop_tokens, drafter, target.largest_tree)
        self._drafter = drafter
        self._closed_device = target.device  # once closed
        self._sequence: Sequence | None = Sequence(target, drafter, lookup_cache=lookup_cache)
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
        max_slowdown: float = Scheduler.max_slowdown,
        draft_model: str | Path | None = None,
        lookup_cache: int = 0,
        gpu_layers: int | str | None = None,
        progress: Progress = silent,
    ) -> Self:
        """Open a pair folder. Every file is checked before a weight is loaded.

        drafter_device: "cuda", "webgpu", "openvino-gpu", "cpu", or "auto" for a GPU that is quicker than the CPU.
        If the GPU fails later, the drafter moves to the CPU, with a warning in the log. vram: bytes
        of the GPU for the drafter and the gpu_layers, or "3GB"; None for the pair's own limit. fit: its
        context may shrink to that. threads: of each engine, None for the engines' choice.
        tree: every tree grows to these limits. None shapes each tree by its cost and worth here.
        The first opening then measures the machine for some seconds, and reports to `progress`.
        ov_config: properties of OpenVINO's CPU plugin for the target, by name.
        exact: a text is the same tokens with any tree and with none. With False plain passes may
        run through OpenVINO's kernel for single rows, which is quicker and rounds otherwise.
        max_slowdown: share of the time, 0 to 1, that drafts may lose in the long run.
        draft_model: the folder of another pair, whose target drafts on the CPU in place of any
        drafter. Its tokenizer may differ, if half of the target's tokens in a sample text are
        common to both.
        lookup_cache: tokens of earlier prompts and answers, kept in memory, that repeated text may
        continue too. No answer changes, but its time then tells something of earlier texts: leave
        0 where an engine answers for several people. `reset` and `choices` forget these texts.
        gpu_layers: first layers of the target that run on the GPU, or "auto" for as many as `vram` has room for
        beside the drafter; None for the pair's own number. If the GPU fails later, they move to the CPU.
        Raises PairError, DeviceError, InputError.
        """
        from dovetail.runtime.drafter.vram import parse_size
        from dovetail.runtime.load import LoadOptions, load

        check_lookup_cache(lookup_cache)  # before seconds of loading
        room = parse_size(vram) if isinstance(vram, str) else vram
        options = LoadOptions(
            drafter_device, room, fit, threads, tree, ov_config or {}, exact, max_slowdown,
            draft_model, gpu_layers=gpu_layers,
        )  # fmt: skip
        parts = load(Path(path), options, progress)
        return cls(**vars(parts), lookup_cache=lookup_cache)

    @property
    def tokenizer(self) -> TextTokenizer:
        return self._front.tokenizer

    @property
    def max_context(self) -> int:
        """Tokens of a prompt and its answer."""
        return self._front.max_context

    @property
    def tree(self) -> TreeLimits:
        """Default limits of trees."""
        return self._front.tree

    @tree.setter
    def tree(self, limits: TreeLimits) -> None:
        self._front.tree = limits

    @property
    def scheduler(self) -> Policy | None:
        """Shapes the trees within their limits, if there is one."""
        return self._front.scheduler

    @property
    def stop_tokens(self) -> frozenset[int]:
        return self._front.stop_tokens

    @property
    def target_device(self) -> str:
        """Where the target runs now."""
        return self._sequence.target.device if self._sequence else self._closed_device

    @property
    def drafter_device(self) -> str | None:
        """Where the drafter runs now."""
        return self._drafter.device if self._drafter else None

    @property
    def drafter_note(self) -> str | None:
        """Why the drafter runs there, if it says so."""
        return (self._drafter.report.note or None) if self._drafter else None

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        **options: Unpack[RequestOptions],
    ) -> GenerationResult:
        """Return the whole answer to `prompt`. Arguments: see `stream`."""
        chunks = self.stream(prompt, max_new_tokens, **options)
        return GenerationResult.of(list(chunks))

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
        constraint: Constraint | None = None,
        logprobs: int | None = None,
        trace: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Generator[Chunk, None, None]:
        """Return the answer to `prompt`, chunk by chunk. Close the generator to end it early.

        prompt: messages of a conversation, token ids, or a string. A string is one user turn; with
        raw=True, or if the target has no chat template, it is the text itself. template_options:
        variables of the chat template, {"tools": [...], "enable_thinking": False}. parse_special:
        whether special tokens that messages or tools spell out act as such; False makes them text.
        With tools the text shows the special tokens that mark tool calls; see text/tool_calls.py.
        stop: strings that end the answer. speculate: False decodes without drafts. tree: limits
        that all trees of this answer grow to. constraint: the answer's grammar, from `constraint`;
        the answer ends where nothing can follow. logprobs: report the target's log-probability of
        each token, and this many of its best alternatives. trace: chunks have a `round`: the tree,
        and what was accepted of it. sampling: see SamplingParams.
        Raises InputError at once for an unusable value, ContextOverflow for a prompt without room.
        """
        sequence, meter = self._open_sequence(), Meter()
        ask = self._front.ask(
            prompt, max_new_tokens, stop=stop, speculate=speculate, raw=raw, template_options=template_options,
            parse_special=parse_special, tree=tree, constraint=constraint, logprobs=logprobs, trace=trace, **sampling,
        )  # fmt: skip
        meter.lap("other")
        return self._run(sequence, ask, meter)

    def constraint(
        self,
        *,
        json_schema: str | Mapping[str, Any] | None = None,
        regex: str | None = None,
        grammar: str | None = None,
    ) -> Constraint:
        """Return a grammar for answers of this engine, from one of the three; see `grammar_source`.

        Each grammar is compiled once. Raises InputError for a grammar that cannot be used, and
        without llguidance, which the extra `grammar` installs.
        """
        return self._front.constraint(json_schema=json_schema, regex=regex, grammar=grammar)

    def count_tokens(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        template_options: Mapping[str, Any] | None = None,
        parse_special: bool = False,
    ) -> int:
        """Return the number of tokens of `prompt`, template included. Raises as `stream` does."""
        return self._front.count_tokens(prompt, raw, template_options, parse_special)

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
        """Return the target's choice in place of each token id of `answer`, read again in chains.

        sampling: the answer's, with its seed. The engine then holds this conversation. Raises
        InputError, also for unknown ids, and ContextOverflow.
        """
        sequence = self._open_sequence()
        tokens = encode_prompt(self.tokenizer, prompt, raw, template_options, parse_special)
        if (count := len(tokens) + len(answer)) > self.max_context:
            raise ContextOverflow(
                f"prompt and answer have {count} tokens, the context {self.max_context}: cut the answer"
            )
        sampler = Sampler(SamplingParams(**sampling), prompt_tokens=len(tokens))
        with self._running():
            return read_again(sequence, tokens, answer, sampler)

    def reset(self) -> None:
        """Forget all conversations: the next prompt is read from its first token."""
        sequence = self._open_sequence()
        with self._running():
            sequence.forget()

    def close(self) -> None:
        """Let go of the sessions and their memory. A running stream keeps them until it ends."""
        self._closed_device = self.target_device
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

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _open_sequence(self) -> Sequence:
        if self._sequence is None:
            raise InputError("this engine is closed: open another with Engine.from_pretrained")
        return self._sequence

    @contextmanager
    def _running(self) -> Generator[None, None, None]:
        if not self._busy.acquire(blocking=False):
            raise InputError("another generation of this engine is running: end or close its stream first")
        try:
            yield
        finally:
            self._busy.release()

    def _run(self, sequence: Sequence, ask: Ask, meter: Meter) -> Generator[Chunk, None, None]:
        with self._running():
            meter.resume()
            answer = Answer(ask, self.tokenizer, meter)
            with closing(decode(sequence, ask.request, meter)) as steps:
                for step in steps:
                    meter.resume()
                    chunk = answer.chunk(step)
                    yield chunk
                    if chunk.finish_reason:
                        return
