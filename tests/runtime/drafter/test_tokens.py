"""A drafter that reads tokens alone: a small language model in the tree graph, on the CPU and on a device.

Its independent reference is transformers' forward pass over the text and the path to each node.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="a pair is exported")

from tests.runtime.conftest import Pairs
from transformers import LlamaForCausalLM

from dovetail.runtime.batch_engine import BatchEngine
from dovetail.runtime.drafter import open as opening
from dovetail.runtime.drafter import window as window_module
from dovetail.runtime.drafter.failover import FailoverDrafter
from dovetail.runtime.drafter.onnx import OnnxDrafter, TokenDrafter
from dovetail.runtime.drafter.open import open_cpu
from dovetail.runtime.drafter.session import Ask, DraftsTogether, ReadsTokens
from dovetail.runtime.drafter.vram import plan_pair
from dovetail.runtime.drafter.window import Drafting, TokenWindow, propose_together, window
from dovetail.runtime.engine import Engine
from dovetail.runtime.errors import ContextOverflow, DeviceError, InputError
from dovetail.runtime.tree.draft_tree import DraftTree
from dovetail.runtime.tree.limits import TreeLimits

SEQ = 1  # the number of a text
LIMITS = TreeLimits(width=12, depth=4, top_k=3, lookup=0)


@pytest.fixture(scope="module")
def models(language_pair: Path) -> Pairs:
    return Pairs(language_pair)


@pytest.fixture(scope="module")
def text() -> list[int]:
    """300 random tokens."""
    return [int(token) for token in np.random.default_rng(1).integers(0, 263, 300)]


@pytest.fixture(scope="module")
def exact(models: Pairs, soft_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., OnnxDrafter]:
    """Opens the same drafter in float32 on the CPU."""
    from dovetail.exporter.drafter.export import load_drafter, save
    from dovetail.exporter.drafter.graph import to_onnx
    from dovetail.models.drafter import DraftModel

    facts = models.manifest.needed_drafter
    module = load_drafter(soft_llama, models.pair / "target")
    assert isinstance(module, DraftModel)
    folder = tmp_path_factory.mktemp("f32")
    save(to_onnx(module, torch.float32, tree_slots=facts.tree_slots, top_k=facts.top_k), folder / "f32.onnx")
    in_f32 = replace(facts, files={**facts.files, "cpu": "f32.onnx"})

    def opened(texts: int = 1, **changes: Any) -> OnnxDrafter:
        return open_cpu(folder, replace(in_f32, **changes), "a test", threads=1, texts=texts)

    return opened


@pytest.fixture(scope="module")
def model(soft_llama: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(soft_llama).eval()


def read(drafter: OnnxDrafter, tokens: Sequence[int], seq: int = SEQ) -> None:
    drafter.extend(seq, np.array(tokens, np.int64), np.zeros((len(tokens), 0), np.float32))


def assert_of_the_model(tree: DraftTree, model: LlamaForCausalLM, text: Sequence[int], atol: float = 1e-4) -> None:
    """Each node's log-probability is the model's, after the text and the path to the node."""
    assert tree.tokens[0] == text[-1] and len(tree) > 6
    for node in range(1, len(tree)):
        path, parent = list[int](), int(tree.parents[node])
        while parent > 0:
            path, parent = [int(tree.tokens[parent]), *path], int(tree.parents[parent])
        with torch.no_grad():
            logits = model(torch.tensor([[*text, *path]])).logits[0, -1]
        want = torch.log_softmax(logits, -1)[int(tree.tokens[node])]
        own = float(tree.logprobs[node] - tree.logprobs[tree.parents[node]])
        assert abs(own - float(want)) < atol


def test_a_manifest_decides_the_session(models: Pairs, tiny_full_pair: Path) -> None:
    assert [type(pairs.cpu()) for pairs in (models, Pairs(tiny_full_pair))] == [TokenDrafter, OnnxDrafter]
    for pairs, reads in ((models, True), (Pairs(tiny_full_pair), False)):
        for drafter in (pairs.cpu(), FailoverDrafter(pairs.cpu())):
            assert isinstance(drafter, ReadsTokens) == reads and isinstance(drafter, DraftsTogether)
            assert isinstance(window(drafter, SEQ), TokenWindow) == reads


def test_its_trees_are_those_of_the_model(exact, model: LlamaForCausalLM, text: list[int]) -> None:
    """Reads of 1 to 130 tokens in turns, and a rewind: positions, masks and rows of the KV."""
    drafter, read_to = exact(), 0
    for rows in (5, 1, 130, 2, 17):
        read(drafter, text[read_to : read_to + rows])
        read_to += rows
        assert drafter.length(SEQ) == read_to - 1
        assert_of_the_model(drafter.propose(SEQ, LIMITS), model, text[:read_to])
    drafter.rewind(SEQ, 99)  # pairs, and 100 tokens
    assert drafter.length(SEQ) == 99
    with pytest.raises(InputError, match="nothing to draft from"):
        drafter.propose(SEQ, LIMITS)
    other = [*text[:100], 7, 8, 9]
    read(drafter, other[100:])
    assert_of_the_model(drafter.propose(SEQ, LIMITS), model, other)
    drafter.rewind(SEQ, 0)
    assert drafter.length(SEQ) == 0
    read(drafter, text[200:230])  # another text, from its first token
    assert_of_the_model(drafter.propose(SEQ, LIMITS), model, text[200:230])


def test_a_chain_is_what_the_model_writes(exact, model: LlamaForCausalLM, text: list[int]) -> None:
    drafter = exact()
    read(drafter, text[:40])
    tree = drafter.propose(SEQ, TreeLimits(width=9, depth=8, top_k=1, lookup=0))
    written = model.generate(torch.tensor([text[:40]]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert tree.tokens.tolist() == written[0, 39:].tolist()


def test_several_texts_at_once_are_those_of_each_alone(exact, model: LlamaForCausalLM, text: list[int]) -> None:
    """Texts of different lengths, read and drafted in shared calls; one ends, and another takes its place."""
    drafter = exact(texts=3)
    ends = {1: 30, 2: 200, 3: 77}
    asks = {seq: Ask(LIMITS, None) for seq in ends}
    for more in (4, 1, 9):
        begins = {seq: drafter.length(seq) + bool(drafter.length(seq)) for seq in ends}
        drafter.extend_all(
            {
                seq: (np.array(text[begins[seq] : end]), np.zeros((end - begins[seq], 0), np.float32))
                for seq, end in ends.items()
            }
        )
        for seq, tree in drafter.propose_all(asks).items():
            assert_of_the_model(tree, model, text[: ends[seq]])
        ends = {seq: end + more for seq, end in ends.items()}
    with pytest.raises(InputError, match="room for 3 sequences"):
        read(drafter, text[:5], seq=4)
    drafter.rewind(2, 0)
    read(drafter, text[50:60], seq=4)
    assert_of_the_model(drafter.propose(4, LIMITS), model, text[50:60])


@pytest.mark.parametrize("texts", [1, 2])
def test_a_part_holds_a_token_more_than_pairs(exact, text: list[int], texts: int) -> None:
    """A full text writes into no row of its neighbour."""
    part = 256
    drafter = exact(texts=texts, max_context=part)
    assert drafter.capacity == part - 1
    if texts == 2:
        read(drafter, text[: part - 10], seq=2)
        before = drafter.propose(2, LIMITS)
        drafter.rewind(2, part - 12)
    read(drafter, text[:part])
    assert drafter.length(SEQ) == drafter.capacity
    drafter.propose(SEQ, LIMITS)
    with pytest.raises(ContextOverflow, match=f"{part + 1} tokens exceed the drafter's context of {part}"):
        read(drafter, text[part : part + 1])
    if texts == 2:
        read(drafter, text[part - 11 : part - 10], seq=2)
        after = drafter.propose(2, LIMITS)
        np.testing.assert_array_equal(before.tokens, after.tokens)
        np.testing.assert_allclose(before.logprobs, after.logprobs, atol=1e-4)


def test_features_are_refused_and_none_crosses_the_bus(HostDevice, models: Pairs, text: list[int]) -> None:
    drafter = models.on(HostDevice())
    with pytest.raises(InputError, match=r"features \(5, 32\) do not fit 5 tokens of feature size 0"):
        drafter.extend(SEQ, np.array(text[:5]), np.zeros((5, 32), np.float32))
    moved = drafter.report.bus_bytes
    read(drafter, text[:5])
    first = drafter.report.bus_bytes
    drafter.propose(SEQ, TreeLimits(width=6, depth=2, top_k=3, lookup=0))  # one call
    assert first - moved == drafter.report.bus_bytes - first


def test_float16_in_buckets_drafts_as_the_model_does(
    HostDevice, models: Pairs, model: LlamaForCausalLM, text: list[int]
) -> None:
    """Calls of 1 to 128 rows in turns: what another call left in a bucket's rows is not seen."""
    drafter, begin = models.on(HostDevice()), 0
    for rows in (9, 1, 128, 3, 17, 40, 2):
        read(drafter, text[begin : begin + rows])
        begin += rows
        assert_of_the_model(drafter.propose(SEQ, LIMITS), model, text[:begin], atol=0.1)


def test_what_is_allocated_is_what_was_planned(HostDevice, models: Pairs) -> None:
    device = HostDevice()
    session = models.on(device)
    plan, held = plan_pair(models.manifest), sum(block.nbytes for block in device.blocks.values())
    assert session.capacity == plan.context - 1
    assert plan.state + plan.rows <= held <= plan.state + plan.rows + 60 * 256  # what blocks are rounded up by


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_device_that_fails_in_round_7_leaves_the_text_as_it_is(
    HostDevice, models: Pairs, caplog: pytest.LogCaptureFixture, fault: str, sampling: dict[str, Any]
) -> None:
    expected = models.engine(None).generate(models.prompt, 80, raw=True, speculate=False, **sampling).token_ids
    spoiled = (lambda down: down.view(np.uint8).fill(0xFF)) if fault == "nan" else None  # all bits set: nan
    device = HostDevice()
    engine = models.engine(FailoverDrafter(models.on(device), models.cpu))
    tokens, accepted = list[int](), list[int]()
    with caplog.at_level(logging.WARNING):
        for number, chunk in enumerate(engine.stream(models.prompt, 80, raw=True, **sampling)):
            tokens += chunk.token_ids
            accepted.append(len(chunk.token_ids))
            if number == 7:
                assert engine.drafter_device == "CUDA (fp16)" and not caplog.records
                device.alter = spoiled
                device.fail_at = 0 if spoiled else device.calls.count("wait") + 2
    assert tuple(tokens) == expected
    assert engine.drafter_device == "CPU (int8)" and device.closed
    assert str(engine.drafter_note).startswith("moved there: ")
    (record,) = caplog.records
    assert "moves from CUDA (fp16) to CPU (int8)" in record.message
    assert max(accepted[9:]) > 2  # on the CPU it goes on to draft well


def test_answers_at_once_survive_a_device_that_fails(HostDevice, models: Pairs) -> None:
    prompts = [models.prompt, "the then in the inn", "hello", "a b c d e f g h i j k l m n"]
    want = [models.engine(None).generate(prompt, 40, raw=True, speculate=False).token_ids for prompt in prompts]
    device = HostDevice()
    from dovetail.runtime.target.openvino import OpenVINOTarget
    from dovetail.runtime.text.tokenizer import Tokenizer

    target = OpenVINOTarget.load(models.pair, models.manifest, threads=1, sequences=3)
    drafter = FailoverDrafter(models.on(device, texts=3), lambda note: models.cpu(note, texts=3))
    tokenizer = Tokenizer.from_folder(models.pair / "target")
    with BatchEngine(target, drafter, tokenizer, slots=3, tree=LIMITS, stop_tokens=()) as engine:
        jobs = [engine.submit(engine.ask(prompt, 40, raw=True)) for prompt in prompts]
        tokens: dict[Any, list[int]] = {job: [] for job in jobs}
        steps = 0
        while not engine.idle:
            steps += 1
            if steps == 5:
                assert drafter.device == "CUDA (fp16)"
                device.fail_at = device.calls.count("wait") + 1
            for job, chunk in engine.step():
                tokens[job] += chunk.token_ids  # type: ignore[union-attr]  # no answer fails
        stats = engine.stats()
    assert [tuple(tokens[job]) for job in jobs] == want
    assert drafter.device == "CPU (int8)" and stats.accepted > 60


def test_a_drafter_that_moved_reads_the_last_pairs(
    HostDevice, models: Pairs, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_module, "KEPT", 60)
    device = HostDevice()
    drafter = FailoverDrafter(models.on(device), models.cpu)
    told = TokenWindow(drafter, SEQ)
    told.add(np.zeros((99, 32), np.float32))
    told.flush(text[:100], None)
    assert (told.start, told.length) == (0, 99)
    device.fail_at = 1
    tree = told.propose(text[:100], LIMITS, None, None)
    assert drafter.device == "CPU (int8)" and (told.start, told.length) == (39, 60)
    fresh = models.cpu()
    read(fresh, text[39:100])
    models.assert_alike(tree, fresh.propose(SEQ, LIMITS))
    told.cut(70)
    told.rewind()
    told.add(np.zeros((20, 32), np.float32))
    tree = told.propose(text[:91], LIMITS, None, None)
    assert (told.start, told.length) == (39, 51)
    fresh.rewind(SEQ, 0)
    read(fresh, text[39:91])
    models.assert_alike(tree, fresh.propose(SEQ, LIMITS))


def test_a_window_is_told_of_a_move_in_another_texts_call(HostDevice, models: Pairs, text: list[int]) -> None:
    device = HostDevice()
    drafter = FailoverDrafter(models.on(device, texts=2), lambda note: models.cpu(note, texts=2))
    windows = [TokenWindow(drafter, seq) for seq in (1, 2)]
    known = [text[:50], text[100:140]]
    for told, tokens in zip(windows, known, strict=True):
        told.add(np.zeros((len(tokens) - 1, 32), np.float32))
        told.flush(tokens, None)
    device.fail_at = 1
    windows[0].propose(known[0], LIMITS, None, None)
    assert drafter.length(2) == 0 and windows[1].length == 39
    ask = Ask(LIMITS, None)
    trees = propose_together([Drafting(told, tokens, ask) for told, tokens in zip(windows, known, strict=True)])
    assert windows[1].length == 39
    for tree, tokens in zip(trees, known, strict=True):
        fresh = models.cpu()
        read(fresh, tokens)
        models.assert_alike(tree, fresh.propose(SEQ, LIMITS))


@pytest.mark.parametrize("read_before", [0, 100])
def test_after_an_interrupted_call_the_drafter_goes_on(models: Pairs, text: list[int], read_before: int) -> None:
    """The first of two chunks was read when Ctrl-C came."""
    drafter = models.cpu()
    told = TokenWindow(drafter, SEQ)
    told.add(np.zeros((read_before, 32), np.float32))
    told.flush(text, None)
    runner = drafter._runner
    run, calls = runner.run, list[int]()

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*arguments, **options)

    runner.run = interrupted  # type: ignore[method-assign]  # what is tested
    told.add(np.zeros((150, 32), np.float32))
    with pytest.raises(KeyboardInterrupt):
        told.flush(text, None)
    assert drafter.length(SEQ) > read_before
    told.cut(read_before)
    told.rewind()
    assert drafter.length(SEQ) == read_before and not told.waiting
    told.add(np.zeros((20, 32), np.float32))
    tree = told.propose(text[: read_before + 21], LIMITS, None, None)
    fresh = models.cpu()
    read(fresh, text[: read_before + 21])
    models.assert_alike(tree, fresh.propose(SEQ, LIMITS))


def test_with_no_second_drafter_the_failure_is_raised(HostDevice, models: Pairs) -> None:
    engine = models.engine(FailoverDrafter(models.on(HostDevice(fail_at=6))))
    with pytest.raises(DeviceError, match="illegal memory access"):
        engine.generate(models.prompt, 60, raw=True)


def test_a_full_context_begins_anew_with_its_last_half(exact, model: LlamaForCausalLM, text: list[int]) -> None:
    told, starts = TokenWindow(exact(max_context=64), SEQ), list[tuple[int, int]]()
    for known in (40, 63, 64, 70, 95, 96, 97):
        told.add(np.zeros((known - told.start - told.length, 32), np.float32))
        tree = told.propose(text[: known + 1], LIMITS, None, None)
        starts.append((told.start, told.length))
        assert_of_the_model(tree, model, text[told.start : known + 1])
    assert starts == [(0, 40), (0, 63), (33, 31), (33, 37), (33, 62), (33, 63), (66, 31)]


def test_a_text_longer_than_the_context_is_drafted_to_its_end(models: Pairs) -> None:
    facts = replace(models.manifest.needed_drafter, max_context=64)
    drafter = open_cpu(models.pair, facts, "a test", threads=1)
    want = models.engine(None).generate(models.prompt, 150, raw=True, speculate=False).token_ids
    engine = models.engine(drafter)
    chunks = list(engine.stream(models.prompt, 150, raw=True))
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == want
    assert len(chunks) < 110 and max(len(chunk.token_ids) for chunk in chunks[-20:]) > 1


def test_a_provider_that_refuses_at_load_leaves_it_on_the_cpu(models: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> Any:
        raise DeviceError("cudaStreamCreateWithFlags: no CUDA-capable device is detected (code 100)")

    monkeypatch.setattr(opening, "cuda_problem", lambda: None)
    monkeypatch.setattr(opening, "CudaDevice", refuse)
    with Engine.from_pretrained(models.pair, tree=LIMITS) as engine:
        assert engine.generate(models.prompt, 30, raw=True).metrics.accepted > 10
        assert engine.drafter_device == "CPU (int8)"


@pytest.mark.usefixtures("quick_costs")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_pair_is_measured_and_scheduled(HostDevice, models: Pairs, monkeypatch, temperature: float) -> None:
    monkeypatch.setattr(opening, "cuda_problem", lambda: None)
    monkeypatch.setattr(opening, "CudaDevice", lambda _: HostDevice())
    for device in ("cpu", "cuda"):
        with Engine.from_pretrained(models.pair, drafter_device=device) as engine:
            drafted = engine.generate(models.prompt, 60, raw=True, temperature=temperature, seed=2)
            plain = engine.generate(models.prompt, 60, raw=True, temperature=temperature, seed=2, speculate=False)
        assert drafted.token_ids == plain.token_ids
