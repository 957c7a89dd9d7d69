"""The loop, on token ids and two sessions: prefill, draft, verify, accept, commit, yield."""

from __future__ import annotations

from collections.abc import Generator

from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.loop.round import draft
from dovetail.runtime.loop.sequence import Request, Sequence, Step


def decode(sequence: Sequence, request: Request, meter: Meter) -> Generator[Step, None, None]:
    """Yield one Step from the prefill, then one per round. The last Step says why the answer ends.

    After any error, end or interrupt the sequence stays usable. Raises the sessions' errors.
    """
    policy, meter.prompt_tokens = request.scheduler, len(request.prompt)
    try:
        meter.cached_tokens = sequence.begin(request)
        if (step := sequence.first(sequence.prefill())).error:
            raise step.error
        meter.new_tokens = len(step.tokens)
        if policy and sequence.speculates and step.finish is None:
            policy.start(sampled=not request.sampling.greedy)
        meter.lap("prefill")
        meter.first_token()
        yield step

        if step.finish is None:  # the first token does not wait for the drafter
            meter.resume()
            sequence.flush()
            meter.lap("prefill")

        moved = sequence.bus_bytes
        while step.finish is None:
            meter.resume()
            offer = draft([sequence], policy)
            (tree,) = offer.trees
            draft_ms = meter.lap("draft")

            result = sequence.target.verify({sequence.id: tree}, rows=offer.rows)[sequence.id]
            verify_ms = meter.lap("verify")

            found = sequence.accept(tree, result)
            if (step := found.step).error:
                raise step.error
            meter.lap("other")

            sequence.commit(found.verdict.path[: len(step.tokens) + 1], step.tokens)
            verify_ms += meter.lap("verify")

            if policy and (outcome := offer.outcome([found.verdict.tokens], draft_ms, verify_ms)):
                policy.learn(outcome)
            sequence.tell(found.features[: len(step.tokens)])  # one for each known next token
            meter.lap("other")
            meter.add_round(len(tree) - 1, min(found.verdict.accepted, len(step.tokens)))
            meter.bus_bytes = sequence.bus_bytes - moved
            meter.new_tokens += len(step.tokens)
            yield found.traced(tree, draft_ms, verify_ms) if request.trace else step
    finally:
        sequence.end()
