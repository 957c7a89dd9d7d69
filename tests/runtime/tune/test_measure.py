"""Measuring gives rising curves and leaves sessions that write the same; the cache spares it while nothing changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="a pair is exported")

from dovetail.runtime.drafter.graph_io import CHUNK
from dovetail.runtime.drafter.onnx import OnnxDrafter
from dovetail.runtime.drafter.open import open_drafter
from dovetail.runtime.drafter.runners.cpu import CpuRunner
from dovetail.runtime.errors import DeviceError, InputError
from dovetail.runtime.loop.generate import decode
from dovetail.runtime.loop.metrics import Meter
from dovetail.runtime.loop.sequence import Request, Sequence
from dovetail.runtime.pair.manifest import Manifest, file_entry, parse_record, read_manifest
from dovetail.runtime.policy.costs import Costs, Curve
from dovetail.runtime.system import machine
from dovetail.runtime.system.machine import Cpu
from dovetail.runtime.target.openvino import OpenVINOTarget
from dovetail.runtime.target.paged import Batch
from dovetail.runtime.tree.limits import TreeLimits
from dovetail.runtime.tune import cost_cache
from dovetail.runtime.tune import measure as tune
from dovetail.runtime.tune.cost_cache import CostKey, Measured, recall
from dovetail.runtime.tune.measure import ROWS, known_or_measured, measure

CONTEXTS, WIDTHS, SECONDS = (16, 64), (1, 2, 3, 4, 6), 0.01
ONE = Curve((0,), (1,), ((1.0,),))
FLAT = Costs(ONE, ONE)
CPU = Cpu("A CPU", 2, 4, 4, ())


@dataclass
class Sessions:
    manifest: Manifest
    target: OpenVINOTarget
    drafter: OnnxDrafter

    def text(self) -> list[int]:
        """Forty tokens, drafted and verified from empty sessions."""
        talk = Sequence(self.target, self.drafter)
        request = Request(tuple(range(5, 25)), 40, limits=TreeLimits(width=8, depth=3, top_k=2))
        tokens = [token for step in decode(talk, request, Meter()) for token in step.tokens]
        talk.close()
        return tokens

    def empty(self) -> bool:
        """Whether nothing is held of any text."""
        owners = self.target.model.pool.owners
        return not self.target._texts and len({*owners.tolist()}) == 2 and not self.drafter._texts  # nobody, the model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOVETAIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "costs"


@pytest.fixture(scope="module")
def opened(tiny_full_pair: Path) -> Sessions:
    manifest = read_manifest(tiny_full_pair)
    target = OpenVINOTarget.load(tiny_full_pair, manifest, threads=1)
    return Sessions(manifest, target, open_drafter(tiny_full_pair, manifest, device="cpu", threads=1))


@pytest.fixture
def sessions(opened: Sessions) -> Iterator[Sessions]:
    yield opened
    assert opened.empty()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Arguments of each measurement that was made, in place of making it."""
    calls: list[dict] = []

    def measure(*_: object, **arguments: object) -> Costs:
        calls.append(arguments)
        return FLAT

    monkeypatch.setattr(tune, "measure", measure)
    return calls


def ask(sessions: Sessions, threads: int | None = None) -> Costs:
    return known_or_measured(sessions.manifest, sessions.target, sessions.drafter, threads)


def test_curves_rise_along_both_axes(sessions: Sessions) -> None:
    costs = measure(sessions.target, sessions.drafter, contexts=CONTEXTS, widths=WIDTHS, seconds=5 * SECONDS)
    assert costs.draft
    for curve in (costs.target, costs.draft):
        ms = np.array(curve.ms)
        assert curve.contexts == CONTEXTS and curve.rows[0] == 1
        assert (ms > 0).all() and (np.diff(ms, axis=0) >= 0).all() and (np.diff(ms, axis=1) >= 0).all()
    assert costs.target.rows[-1] == WIDTHS[-1] and costs.draft.rows[-1] == CHUNK


def test_a_target_alone_is_measured_and_its_costs_survive_json(sessions: Sessions) -> None:
    costs = measure(sessions.target, None, contexts=CONTEXTS, widths=WIDTHS, seconds=SECONDS)
    assert costs.draft is None and costs.call_ms(16, 4) == 0.0 and costs.target.contexts == CONTEXTS
    assert parse_record(Costs, json.loads(json.dumps(asdict(costs))), "costs") == costs


def test_a_change_of_width_is_what_the_first_of_two_passes_takes_more(sessions: Sessions, monkeypatch) -> None:
    spent, last = [0.0], [0]

    def call(watch: object, point: tune._Point) -> float:
        spent[0] += 1e-3
        changed, last[0] = point.engine == "target" and last[0] != point.size, point.size
        return 10.0 + point.size + 5.0 * changed

    monkeypatch.setattr(tune, "perf_counter", lambda: spent[0])
    monkeypatch.setattr(tune._Stopwatch, "call", call)
    costs = measure(sessions.target, sessions.drafter, contexts=CONTEXTS, widths=WIDTHS, seconds=0.5)
    assert costs.switch_ms == 5.0
    assert costs.target.ms[0] == tuple(10.0 + width for width in costs.target.rows)


def test_all_is_measured_where_there_is_time_and_less_where_there_is_not(sessions: Sessions, monkeypatch) -> None:
    ticks = iter(range(10**9))
    monkeypatch.setattr(tune, "perf_counter", lambda: next(ticks) * 1e-3)  # a call takes 1 ms, whatever it takes

    def sizes(seconds: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
        costs = measure(sessions.target, sessions.drafter, contexts=CONTEXTS, widths=WIDTHS, seconds=seconds)
        assert costs.draft
        return costs.target.rows, costs.draft.rows

    assert sizes(1.0) == (WIDTHS, ROWS)
    assert sizes(0.05) == ((1, 4, 6), (1, 4, 8, 16, 128))


def test_every_point_is_timed_twice_and_then_until_the_time_is_over(sessions: Sessions, monkeypatch) -> None:
    ticks, timed = iter(range(10**9)), list[object]()
    monkeypatch.setattr(tune, "perf_counter", lambda: next(ticks) * 1e-3)
    time = tune._Stopwatch.time

    def noted(watch: tune._Stopwatch, point: tune._Point) -> None:
        timed.append(point)
        time(watch, point)

    monkeypatch.setattr(tune._Stopwatch, "time", noted)
    for seconds, least in ((0.001, tune.SAMPLES), (1.0, 4)):
        timed.clear()
        measure(sessions.target, sessions.drafter, contexts=CONTEXTS, widths=WIDTHS, seconds=seconds)
        counts = [timed.count(point) for point in set(timed)]
        assert min(counts) >= least and max(counts) - min(counts) <= 2
    assert next(ticks) > 1000


def test_progress_rises_to_the_end(sessions: Sessions) -> None:
    said: list[float] = []

    def progress(stage: str, done: float = 0, total: float = 0, note: str = "") -> None:
        said.append(done / total)

    measure(sessions.target, sessions.drafter, contexts=CONTEXTS, widths=WIDTHS, seconds=SECONDS, progress=progress)
    assert said == sorted(said) and said[0] == 0 and said[-1] == pytest.approx(1, abs=0.2)


def test_the_nodes_of_a_timed_pass_are_different_tokens(sessions: Sessions, monkeypatch) -> None:
    """As in a tree of real text: equal tokens would go to the same experts, so that wide passes seemed cheap."""
    passes, run = list[np.ndarray](), sessions.target.model.run

    def noted(batch: Batch) -> object:
        passes.append(batch.tokens)
        return run(batch)

    monkeypatch.setattr(sessions.target.model, "run", noted)
    measure(sessions.target, None, contexts=CONTEXTS, widths=(1, 4, 6), seconds=SECONDS)
    different = {(len(tokens), len(np.unique(tokens))) for tokens in passes}
    assert different == {(2, 1), (4, 4), (6, 6)}  # a pass of one node computes its row twice


def test_sessions_end_empty_and_write_the_same_text(sessions: Sessions) -> None:
    before = sessions.text()
    measure(sessions.target, sessions.drafter, contexts=CONTEXTS, widths=WIDTHS, seconds=SECONDS)
    assert sessions.empty()
    with pytest.raises(InputError, match="extend the drafter"):
        sessions.drafter.propose(1, TreeLimits())
    assert sessions.text() == before and len(before) == 40


def test_a_failure_leaves_the_sessions_empty(sessions: Sessions, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise DeviceError("out of memory")

    monkeypatch.setattr(sessions.drafter, "extend", fail)
    with pytest.raises(DeviceError):
        measure(sessions.target, sessions.drafter, contexts=CONTEXTS, widths=WIDTHS, seconds=SECONDS)
    assert sessions.empty()


@pytest.mark.parametrize(("room", "contexts"), [(256, (16, 128)), (255, (16,)), (140, (12,)), (128, (0,)), (100, (0,))])
def test_contexts_without_room_are_left_out(sessions: Sessions, monkeypatch, room: int, contexts) -> None:
    monkeypatch.setattr(sessions.target, "max_context", room)
    monkeypatch.setattr(sessions.drafter, "capacity", room)
    costs = measure(sessions.target, sessions.drafter, contexts=(16, 128, 1024), widths=(1, 4), seconds=SECONDS)
    assert costs.draft and costs.target.contexts == costs.draft.contexts == contexts
    assert costs.draft.rows[-1] == (64 if room < CHUNK else CHUNK)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"contexts": ()}, "contexts"),
        ({"contexts": (-1, 5)}, "contexts"),
        ({"widths": ()}, "widths"),
        ({"widths": (0, 1)}, "widths"),
        ({"seconds": 0.0}, "seconds 0"),
        ({"seconds": float("inf")}, "seconds inf"),
    ],
)
def test_what_cannot_be_measured_is_refused(sessions: Sessions, arguments: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        measure(
            sessions.target, sessions.drafter, **{"contexts": (16,), "widths": (1,), "seconds": SECONDS} | arguments
        )


def test_pretended_tokens_have_memory_of_their_own_and_keep_what_they_hold(sessions: Sessions) -> None:
    sessions.text()
    runner = sessions.drafter._runner
    assert isinstance(runner, CpuRunner)
    kv: list[np.ndarray] = [*(group.data for group in sessions.target.model._groups), *runner._kv.values()]
    before = [array.copy() for array in kv]
    seq = sessions.target.open()
    sessions.target.pretend_length(seq, 10)
    sessions.drafter.pretend_length(seq, 10)
    assert (sessions.target.length(seq), sessions.drafter.length(seq)) == (10, 10)
    for array, copy in zip(kv, before, strict=True):
        np.testing.assert_array_equal(array, copy)
    sessions.target.pretend_length(seq, 200)
    assert sessions.target.model.blocks >= 200 / 32
    sessions.target.close(seq)
    sessions.drafter.rewind(seq, 0)


def test_what_was_measured_is_not_measured_again(sessions: Sessions, measured: list[dict], cache: Path) -> None:
    assert ask(sessions) == ask(sessions) == FLAT
    assert len(measured) == 1 and measured[0]["seconds"] < 5
    (file,) = cache.iterdir()
    kept = json.loads(file.read_text())
    assert kept["pair"] == sessions.manifest.name and kept["key"]["device"] == "cpu" and kept["seconds"] >= 0
    assert {"cpu", "usable_threads"} <= kept["machine"].keys() and "openvino" in kept["versions"] and kept["date"]


def test_a_thorough_measurement_is_preferred(sessions: Sessions, measured: list[dict]) -> None:
    ask(sessions)
    better = Costs(ONE, Curve((0,), (1,), ((2.0,),)))
    Measured("tiny", CostKey.of(sessions.manifest, "cpu", None), better, 60.0).store()
    assert ask(sessions) == better and len(measured) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: b"{",
        lambda raw: b"\xff\xfe",
        lambda raw: b"null",
        lambda raw: b"[" * 100_000,
        lambda raw: json.dumps({**raw, "key": {}}).encode(),
        lambda raw: json.dumps({**raw, "costs": {}}).encode(),
        lambda raw: json.dumps({**raw, "costs": {**raw["costs"], "copy": raw["costs"]["target"]}}).encode(),  # older
        lambda raw: json.dumps(raw).replace('"rows": [1]', '"rows": [0]', 1).replace("1.0", "-1.0").encode(),
        lambda raw: json.dumps({name: value for name, value in raw.items() if name != "date"}).encode(),
    ],
)  # fmt: skip
def test_a_damaged_cache_is_measured_again_and_replaced(
    sessions: Sessions, measured: list[dict], cache: Path, damage: Callable[[dict], bytes]
) -> None:
    ask(sessions)
    (file,) = cache.iterdir()
    file.write_bytes(damage(json.loads(file.read_text())))
    assert recall(CostKey.of(sessions.manifest, "cpu", None)) is None
    assert ask(sessions) == FLAT and len(measured) == 2
    assert ask(sessions) == FLAT and len(measured) == 2 and list(cache.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_is_no_error(sessions: Sessions, measured: list[dict], cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert ask(sessions) == ask(sessions) == FLAT and len(measured) == 2


def test_the_key_changes_with_what_costs_depend_on(sessions: Sessions, tmp_path: Path, monkeypatch) -> None:
    versions = {"openvino": "1", "onnxruntime": "2", "numpy": "3"}
    monkeypatch.setattr(machine, "cpu", lambda: CPU)
    monkeypatch.setattr(machine, "versions", lambda: versions)
    manifest = sessions.manifest
    files = [CostKey.of(manifest, "cpu", threads).file for threads in (None, 1, 2)]
    for gpu in ("RTX 3050 8.6", "RTX 4060 8.9"):
        with monkeypatch.context() as patch:
            patch.setattr(cost_cache, "gpu_name", lambda gpu=gpu: gpu)
            files.append(CostKey.of(manifest, "cuda", None).file)
    files.append(replace(CostKey.of(manifest, "cpu", None), spin_us=0).file)
    files.append(CostKey.of(manifest, "cpu", None, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}).file)
    files.append(CostKey.of(manifest, "cpu", None, exact=False).file)
    (tmp_path / "other").write_text("other weights")
    other = file_entry(tmp_path / "other")
    assert manifest.drafter
    for name in ("target/openvino_model.bin", manifest.drafter.files["cpu"]):
        files.append(CostKey.of(replace(manifest, files={**manifest.files, name: other}), "cpu", None).file)
    for name in ("openvino", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(versions, name, "9")
            files.append(CostKey.of(manifest, "cpu", None).file)
    for cpu in (replace(CPU, model="Another"), replace(CPU, usable=1)):
        with monkeypatch.context() as patch:
            patch.setattr(machine, "cpu", lambda cpu=cpu: cpu)
            files.append(CostKey.of(manifest, "cpu", None).file)
    assert len(set(files)) == len(files) == 14
    versions["numpy"] = "9"
    renamed = replace(manifest, name="renamed")
    assert CostKey.of(renamed, "cpu", None).file == files[0]  # neither has a part in it


def test_properties_of_the_target(sessions: Sessions, tiny_full_pair: Path) -> None:
    """They reach OpenVINO; what trees depend on cannot be changed, and what OpenVINO refuses is one line."""
    compiled = sessions.target.model.compiled
    other = OpenVINOTarget.load(tiny_full_pair, sessions.manifest, ov_config={"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"})
    sizes = [int(one.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) for one in (other.model.compiled, compiled)]
    assert sizes[0] == 128 != sizes[1]
    for given, problem in (
        ({"KV_CACHE_PRECISION": "u4"}, "KV_CACHE_PRECISION=u4 is not supported: give f16 or u8"),
        ({"KEY_CACHE_PRECISION": "u8"}, "KEY_CACHE_PRECISION=u8 cannot be given, .*: leave it out"),
        (
            {"KV_CACHE_PRECISION": "u8", "KEY_CACHE_QUANT_MODE": "BY_CHANNEL"},
            "KEY_CACHE_QUANT_MODE=BY_CHANNEL cannot be given",
        ),
        (
            {"KEY_CACHE_GROUP_SIZE": "4"},
            "KEY_CACHE_GROUP_SIZE=4 is for keys and values of 8 bits: give KV_CACHE_PRECISION=u8",
        ),
        *(
            (
                {"KV_CACHE_PRECISION": "u8", "VALUE_CACHE_GROUP_SIZE": size},
                f"VALUE_CACHE_GROUP_SIZE={size} is no .*: give",
            )
            for size in ("-1", "a", "1.5", "100000", str(2**64 - 1), "\u0661\u0666")
        ),
        (
            {"KV_CACHE_PRECISION": "u8", "KEY_CACHE_GROUP_SIZE": "9" * 5000},
            "KEY_CACHE_GROUP_SIZE=9{40} is no group size",
        ),
    ):
        with pytest.raises(InputError, match=problem):
            OpenVINOTarget.load(tiny_full_pair, sessions.manifest, ov_config=given)
    with pytest.raises(DeviceError, match=r"cannot compile .*: correct NO_SUCH_PROPERTY or leave it out") as caught:
        OpenVINOTarget.load(tiny_full_pair, sessions.manifest, ov_config={"NO_SUCH_PROPERTY": "1"})
    assert "\n" not in str(caught.value)
    with pytest.raises(DeviceError, match=r"group_size 48: correct KEY_CACHE_GROUP_SIZE: give a number that divides"):
        given = {"KV_CACHE_PRECISION": "u8", "KEY_CACHE_GROUP_SIZE": "48"}
        OpenVINOTarget.load(tiny_full_pair, sessions.manifest, ov_config=given)
