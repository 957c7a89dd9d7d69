"""Checks a finished pair: manifest, digests, both graphs, tokenizer, a short run of each engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.exporter.target.export import check_verifiable, static_size
from dovetail.exporter.target.graph_probe import EXACT, stateful_logits
from dovetail.exporter.target.sources import IR_GRAPH
from dovetail.exporter.target.tokenizer_copy import probe_tokenizer
from dovetail.runtime.devices.ort import CPU, failures, open_session, session_options
from dovetail.runtime.drafter.graph_io import NOISE, Ports, check_ports, noise_spec, read_draft_ids, state_shapes
from dovetail.runtime.drafter.session import DRAFTING
from dovetail.runtime.errors import DeviceError, DovetailError, IntegrityError, MismatchError, PairError, one_line
from dovetail.runtime.pair.check import check_pair, verify_files
from dovetail.runtime.pair.files import sha256_file
from dovetail.runtime.pair.layout import DEVICES, TARGET, TARGET_GRAPH, TARGET_TOKENIZER
from dovetail.runtime.pair.manifest import DrafterFacts, Manifest, read_manifest
from dovetail.runtime.system.progress import Progress, silent
from dovetail.runtime.target.features import FeatureMix
from dovetail.runtime.target.graph import FEATURES, LOGITS, find_head, has_tap, read_model

PROBE_TOKENS = 8
LOGIT_TOLERANCE = 0.05  # one pass against two, in float32
Activations = type[np.float16] | type[np.float32]
ACTIVATIONS: dict[str, Activations] = {"cuda": np.float16, "cpu": np.float32}
LOGPROB_TOLERANCE = 0.5  # the drafter's INT8 graph against its fp16 graph


def check_pair_folder(pair: Path, progress: Progress = silent) -> Manifest:
    """Check every part of the pair and return its manifest.

    Raises ManifestError at once. A single other failure raises its own error. Several failures
    raise one PairError that names each.
    """
    manifest = read_manifest(pair)
    failures: list[DovetailError] = []

    def attempt(what: str, check: Callable[[], None]) -> bool:
        progress(what)
        try:
            check()
        except DovetailError as error:
            failures.append(error)
            return False
        return True

    attempt("facts", lambda: check_pair(manifest))
    damaged = set(_damaged_parts(pair, manifest, failures, progress))
    if "target" not in damaged:
        attempt("tokenizer", lambda: _check_tokenizer(pair, manifest))
        if attempt("target graph", lambda: _check_target_graph(pair, manifest)):
            attempt("target run", lambda: _run_target(pair, manifest))
    if manifest.drafter and "drafter" not in damaged:
        drafter = manifest.drafter
        attempt("drafter run", lambda: _check_drafter(pair, drafter))
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise PairError(f"{pair} fails {len(failures)} checks: {'; '.join(map(str, failures))}")
    return manifest


def _damaged_parts(pair: Path, manifest: Manifest, failures: list[DovetailError], progress: Progress) -> Iterator[str]:
    """Verify each file separately, to report all damaged files; yield the files' folders."""
    for relative, entry in manifest.files.items():
        progress(f"digest of {relative}")
        try:
            verify_files(pair, replace(manifest, files={relative: entry}, drafter=None), remember=False)
        except IntegrityError as error:
            failures.append(error)
            yield relative.split("/")[0]
    for relative in manifest.drafter.files.values() if manifest.drafter else ():
        if relative not in manifest.files:
            failures.append(IntegrityError(f"{relative} has no digest in the manifest: export the drafter again"))
            yield "drafter"


def _check_tokenizer(pair: Path, manifest: Manifest) -> None:
    digest = sha256_file(pair / TARGET_TOKENIZER)
    if digest != manifest.target.tokenizer_sha256:
        raise MismatchError(f"tokenizer.json ({digest[:12]}) is not the target's: export the target again")
    probe_tokenizer(pair / TARGET)


def _check_target_graph(pair: Path, manifest: Manifest) -> None:
    """Check that the graph has its tap and the manifest's sizes, and can verify trees."""
    facts, model = manifest.target, read_model(pair / TARGET_GRAPH)
    if not has_tap(model):
        raise MismatchError(f"{pair / 'target' / IR_GRAPH} has no {FEATURES!r} output: export the target again")
    feature = find_head(model).input_value(0)
    found = {
        "tap": (feature.get_node().get_friendly_name(), facts.taps[-1]),
        "feature size": (static_size(model.output(FEATURES).get_partial_shape(), FEATURES), facts.feature_size),
        "vocabulary": (static_size(model.output(LOGITS).get_partial_shape(), LOGITS), facts.vocab_size),
    }
    for what, (in_graph, in_manifest) in found.items():
        if in_graph != in_manifest:
            raise MismatchError(
                f"the target's {what} is {in_graph!r}, the manifest says {in_manifest!r}: export the target again"
            )
    check_verifiable(model)


def _run_target(pair: Path, manifest: Manifest) -> None:
    """Check the KV state: one pass over some tokens agrees with two passes over these tokens."""
    import openvino as ov

    compiled = ov.Core().compile_model(pair / TARGET_GRAPH, "CPU", {**EXACT, "KV_CACHE_PRECISION": "f32"})
    ids = np.random.default_rng(0).integers(0, manifest.target.vocab_size, PROBE_TOKENS)
    whole = stateful_logits(compiled, [ids])[-1]
    halves = stateful_logits(compiled, [ids[:3], ids[3:]])[-1]
    if not (np.isfinite(whole).all() and np.isfinite(halves).all()):
        raise MismatchError("the target's logits are not finite: export the target again")
    if (difference := float(np.abs(whole - halves).max())) > LOGIT_TOLERANCE:
        raise MismatchError(f"the target's logits of one pass and of two differ by {difference:.2f}: export it again")


def _check_drafter(pair: Path, facts: DrafterFacts) -> None:
    """Check that each graph runs with the manifest's sizes, and that the graphs agree."""
    if "features" in facts.files:
        FeatureMix.load(pair / facts.files["features"], facts)
    graphs = {device: facts.files[device] for device in DEVICES if device in facts.files}
    best = {device: _run_drafter(pair / file, facts, ACTIVATIONS[device]) for device, file in graphs.items()}
    reference, *others = best.items()
    for device, logprobs in others:
        if (difference := float(np.abs(logprobs - reference[1]).max())) > LOGPROB_TOLERANCE:
            raise MismatchError(
                f"the drafter's graphs for {reference[0]} and {device} differ by {difference:.2f} in "
                "log-probability: export the drafter again"
            )


def _run_drafter(path: Path, facts: DrafterFacts, kind: Activations) -> NDArray[np.float32]:
    """Extend an empty context by two context pairs and return top_logprobs [2, k], of a block [P, k]."""
    import onnxruntime as ort

    try:
        session = open_session(ort, path, session_options(ort), [CPU], DRAFTING)
        ports = Ports.of(session, path)
        check_ports(ports, path, facts, kind)
        drafted = read_draft_ids(ports, path, facts)
    except DeviceError as error:  # the file is at fault, not a device
        raise IntegrityError(str(error)) from error
    try:
        logprobs, ids = session.run(["top_logprobs", "top_ids"], _drafter_inputs(ports, facts, kind))
    except failures() as error:
        reason = one_line(error)[:300]
        raise MismatchError(f"{path.name} fails with the manifest's sizes ({reason}): export it again") from error
    wanted = (facts.positions or 2, facts.top_k)
    if logprobs.shape != wanted or ids.shape != wanted:
        raise MismatchError(f"{path.name} returns {ids.shape[-1]} children, not {facts.top_k}: export it again")
    if not np.isfinite(logprobs).all() or (np.diff(logprobs, axis=-1) > 0).any():
        raise MismatchError(f"{path.name} gives log-probabilities that are not finite or not sorted: export it again")
    if ids.min() < 0 or ids.max() >= facts.target_vocab_size:
        raise MismatchError(f"{path.name} proposes token {int(ids.max())}, beyond the vocabulary: export it again")
    if drafted is not None and not np.isin(ids, drafted).all():
        raise MismatchError(f"{path.name} proposes tokens outside its draft vocabulary: export it again")
    return logprobs


def _drafter_inputs(ports: Ports, facts: DrafterFacts, kind: Activations) -> dict[str, Any]:
    """Inputs of a call: two context pairs with random features, in a context of four slots."""
    slots, size = facts.tree_slots, facts.feature_size
    features = np.random.default_rng(0).standard_normal((2, size)).astype(kind)
    given = ports.given
    noise = {NOISE: np.zeros(*noise_spec(facts))} if NOISE in given else {}
    state = {name: np.zeros(shape, kind) for name, shape in state_shapes(facts, 4).items()}
    rows = {"features": features, "kv_slots": slots + np.arange(2)}
    if facts.positions:
        rows |= {"token": np.array([1]), "context_begin": np.array([0]), "context_end": np.array([2])}
    else:
        rows |= {
            "input_ids": np.array([0, 1]),
            "position_ids": np.array([0, 1]),
            "feature_rows": slots + 1 + np.arange(2),
            "bank_slots": np.array([slots, 0]),
            "context_begin": np.array([0, 0]),
            "context_end": np.array([1, 2]),
            "queries": np.arange(2),
            "tree_mask": np.full((2, slots), -1e4, kind),
        }
    return {name: rows[name] for name in rows if name in given} | noise | state  # graphs of older pairs have fewer
