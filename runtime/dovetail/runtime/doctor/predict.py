"""Predict what a pair's drafter would do on a GPU that is not in this machine.

Nobody has measured these times. A captured call is a chain: one kernel after the other, the bytes
that the kernels read, copies over the bus, and the host's part. Each figure is a range, because the
constants below are known as ranges only. docs/guide/gpu.md shows the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dovetail.runtime.devices.cuda import runs_on
from dovetail.runtime.devices.ort import CPU, open_session, session_options
from dovetail.runtime.doctor import predict_layers
from dovetail.runtime.doctor.estimate import CONTEXT, Speed, Vram, estimate_vram, measured_speed, tune_command
from dovetail.runtime.doctor.gpus import GpuModel
from dovetail.runtime.doctor.predict_layers import LayersPrediction
from dovetail.runtime.doctor.ranges import Range as Range
from dovetail.runtime.drafter.graph_io import row_specs
from dovetail.runtime.drafter.session import DRAFTING
from dovetail.runtime.drafter.vram import BUCKETS, HALF, VramPlan, plan_pair
from dovetail.runtime.errors import DeviceError
from dovetail.runtime.pair.manifest import DrafterFacts, Manifest
from dovetail.runtime.policy.costs import Curve
from dovetail.runtime.system.arrays import nbytes
from dovetail.runtime.tune.cost_cache import CostKey, Measured, recall

# A kernel of a captured chain, in microseconds. The least: CUDA.jl's manual has a graph of 80 small kernels
# in 70 us (https://cuda.juliagpu.org/dev/usage/graphs/). The most: NVIDIA's measurement of short kernels in a
# graph on a V100 (https://developer.nvidia.com/blog/cuda-graphs/).
KERNEL_US = Range(0.9, 3.4)
# The host's part of a call, in microseconds: pad the rows, start the graph and both copies, wait. An assumption
# for Linux; a driver under WSL takes longer.
HOST_US = Range(55.0, 130.0)
# GB/s of a lane in one direction, by PCIe generation: 8, 16 and 32 GT/s with 128 bits of data in 130.
LANE_GB_S = {generation: rate * 128 / 130 / 8 for generation, rate in {3: 8, 4: 16, 5: 32}.items()}
VIEWS = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}  # nodes that start no kernel
LENGTHS = (2, 3)  # acceptance lengths for which the report gives a speed; the smallest tree has 4 nodes


@dataclass(frozen=True)
class Call:
    """A call of the drafter with a few rows, such as a level of a tree."""

    kernels: int  # nodes of the graph that are no views
    read_mb: Range  # MiB of GPU memory
    ms: Range


@dataclass(frozen=True)
class Prediction:
    """What a pair's drafter would do on one GPU."""

    gpu: GpuModel
    problem: str | None  # why the drafter would not run under CUDA
    vram: Vram | None  # None without a graph for a GPU
    call: Call | None = None  # None with a problem
    slowest: Speed | None = None  # None without measured costs of the target
    fastest: Speed | None = None
    tokens_per_s: Mapping[int, Range] | None = None  # by acceptance length
    layers: LayersPrediction | None = None  # of the target, with a limit
    predicted: bool = True


def predict(folder: Path, manifest: Manifest, gpu: GpuModel, limit: int | None) -> Prediction:
    """Return the prediction. limit: bytes that drafter and first layers may take, None for the pair's own limit."""
    found = _predict_drafter(folder, manifest, gpu, limit)
    if limit is None:
        return found
    known = _measured(manifest)
    layers = predict_layers.predict_layers(folder, manifest, gpu, limit, known.costs if known else None)
    return replace(found, layers=layers)


def _predict_drafter(folder: Path, manifest: Manifest, gpu: GpuModel, limit: int | None) -> Prediction:
    vram = estimate_vram(manifest, gpu.memory_gb << 10, limit, where="on this GPU")
    problem = _problem(manifest, gpu, vram)
    if problem:
        return Prediction(gpu, problem, vram)
    facts, plan = manifest.needed_drafter, plan_pair(manifest, limit)
    try:
        kernels = count_kernels(folder / facts.files["cuda"], facts.tree_slots + plan.context)
    except DeviceError as error:
        return Prediction(gpu, str(error), vram)
    least, most = read_bytes(facts, plan)
    fast = [call_ms(facts, gpu, rows, kernels * KERNEL_US.least + HOST_US.least, least) for rows in BUCKETS]
    slow = [call_ms(facts, gpu, rows, kernels * KERNEL_US.most + HOST_US.most, most) for rows in BUCKETS]
    read = Range(round(least / 2**20, 1), round(most / 2**20, 1))
    found = Prediction(gpu, None, vram, Call(kernels, read, Range(round(fast[0], 2), round(slow[0], 2))))
    known = _measured(manifest)
    if known is None:
        return found
    slowest, fastest = (_speed(known, manifest, ms) for ms in (slow, fast))
    speeds = {length: Range(_rate(length, slowest), _rate(length, fastest)) for length in LENGTHS}
    return replace(found, slowest=slowest, fastest=fastest, tokens_per_s=speeds)


def _problem(manifest: Manifest, gpu: GpuModel, vram: Vram | None) -> str | None:
    """Return why the drafter would not run on the GPU under CUDA, or None."""
    if manifest.drafter is None:
        return "the pair has no drafter"
    if vram is None:
        return "the pair has no drafter for a GPU: export the drafter again"
    ways = f"--drafter-device {' or '.join(gpu.without_cuda)} (no time is predicted for it)"
    otherwise = f"the drafter would run on the CPU, or there with {ways}"
    if gpu.capability is None:
        return f"the GPU has no CUDA: {otherwise}"
    if not runs_on(gpu.capability):
        major, minor = gpu.capability
        return f"onnxruntime-gpu has no code for compute capability {major}.{minor}: {otherwise}"
    return None if vram.fits else vram.said


def count_kernels(file: Path, slots: int) -> int:
    """Return the nodes of a graph that start a kernel, with `slots` rows of KV. Raises DeviceError.

    The CPU provider is asked, as there is no other. It splits a Softmax into five nodes.
    """
    import onnxruntime as ort

    options = session_options(ort)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_free_dimension_override_by_name("slots", slots)
    parts = open_session(ort, file, options, [CPU], DRAFTING).get_provider_graph_assignment_info()
    return sum(node.op_type not in VIEWS for part in parts for node in part.get_nodes())


def read_bytes(facts: DrafterFacts, plan: VramPlan) -> tuple[int, int]:
    """Return the least and the most bytes of GPU memory that a call reads.

    The least: weights, head and state. The most adds the activations of the largest call. A call
    takes single rows of the embedding's table, unless the head may use the same table.
    """
    separate = facts.draft_vocab_size < facts.target_vocab_size
    table = facts.target_vocab_size * facts.hidden_size * HALF if separate else 0
    least = plan.weights - table + plan.state
    fixed, per_pair = facts.workspace
    return least, least + fixed + per_pair * plan.context


def call_ms(facts: DrafterFacts, gpu: GpuModel, rows: int, chain_us: float, read: int) -> float:
    """Return the milliseconds of a call. chain_us: kernels and host. read: bytes of GPU memory."""
    generation, lanes = gpu.pcie
    moved = sum(map(nbytes, row_specs(facts, rows, np.float16).values()))
    return chain_us / 1e3 + read / (gpu.bandwidth * 1e6) + moved / (LANE_GB_S[generation] * lanes * 1e6)


def _measured(manifest: Manifest) -> Measured | None:
    """Return the kept costs of this CPU alone, of which the target's part counts."""
    files = manifest.drafter.files if manifest.drafter else {}
    devices: list[str | None] = [device for device in ("cpu", "cuda") if device in files]
    devices = devices or [None]
    return next(filter(None, (recall(CostKey.of(manifest, device, None)) for device in devices)), None)


def _speed(known: Measured, manifest: Manifest, ms: list[float]) -> Speed:
    """Return the speed with calls of the drafter that take `ms`, by BUCKETS."""
    costs = replace(known.costs, draft=Curve((CONTEXT,), BUCKETS, (tuple(ms),)))
    return measured_speed(costs, known.date, manifest)


def _rate(length: int, speed: Speed) -> float:
    """Return the tokens a second of rounds with this acceptance length."""
    assert speed.tree
    return round(1e3 * length / (speed.tree.verify_ms + speed.tree.draft_ms), 1)


def rows(found: Prediction, pair: str) -> list[tuple[str, str]]:
    """Return facts for display, each marked as a prediction. pair: the folder."""
    gpu, said = found.gpu, []
    generation, lanes = gpu.pcie
    cuda = "no CUDA" if gpu.capability is None else "compute capability {}.{}".format(*gpu.capability)
    said.append(f"{gpu.label}: {gpu.bandwidth:g} GB/s, PCIe {generation}.0 x{lanes}, {cuda} ({gpu.source})")
    if found.problem:
        said.append(f"under CUDA the drafter does not run there: {found.problem}")
    elif found.vram and found.call:
        call = found.call
        said.append(f"the drafter {found.vram.said}")
        said.append(f"a call takes {call.ms} ms ({call.kernels} kernels, {call.read_mb} MiB read)")
    if found.call and not (found.slowest and found.fastest):
        said.append(f"a speed needs the target's costs on this CPU: {tune_command(pair)} --gpu-layers 0 measures them")
    if found.slowest and found.fastest and found.slowest.tree and found.fastest.tree and found.tokens_per_s:
        slow, fast = found.slowest.tree, found.fastest.tree
        draft, pays = Range(fast.draft_ms, slow.draft_ms), Range(fast.acceptance_length, slow.acceptance_length)
        said.append(
            f"a round drafts in {draft} ms and is faster than plain decoding above an acceptance length of {pays}"
        )
        speeds = (f"{speed} at acceptance length {length}" for length, speed in found.tokens_per_s.items())
        said.append(f"tokens/s: {', '.join(speeds)}; plain decoding {found.slowest.plain_tokens_per_s:g}, as measured")
    return [("prediction", line) for line in said] + (predict_layers.rows(found.layers) if found.layers else [])
