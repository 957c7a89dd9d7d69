"""Exports a source as a target: a stateful IR with a feature tap, its tokenizer and its facts.

The stage "weights" converts a checkpoint, takes long and needs torch; an IR skips this stage.
The stage "target" fuses projections, adds the tap, copies the tokenizer and checks the copy.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dovetail.exporter.build.stages import PairBuild, Stage
from dovetail.exporter.target.architectures import context_of, original_context
from dovetail.exporter.target.configuration import (
    LAYER_KEYS,
    WIDTH_KEYS,
    check_json,
    read_config,
    text_config,
)
from dovetail.exporter.target.convert import REFERENCE, WeightOptions, convert
from dovetail.exporter.target.embedding_rows import position_rows
from dovetail.exporter.target.fuse_projections import fuse_projections
from dovetail.exporter.target.graph_probe import ir_logits, probe_graph, probe_tokens
from dovetail.exporter.target.sources import IR_GRAPH, Source, check_fetched, resolve_source
from dovetail.exporter.target.tokenizer_copy import TOKENIZER_FILES, copy_tokenizer, probe_tokenizer
from dovetail.runtime.errors import ExportError, InputError, SourceError
from dovetail.runtime.pair.files import sha256_file
from dovetail.runtime.pair.layout import TARGET_WEIGHTS, TOKENIZER
from dovetail.runtime.pair.manifest import Manifest, TargetFacts, parse_record
from dovetail.runtime.system.bounds import CONTEXT_MOST, check_token_ids, check_whole
from dovetail.runtime.system.files import printable, read_object
from dovetail.runtime.system.machine import package_versions as versions
from dovetail.runtime.system.progress import Progress, silent
from dovetail.runtime.target.graph import LOGITS, add_tap, find_head, read_model, to_paged

if TYPE_CHECKING:
    import openvino as ov

PACKAGES = (
    "dovetail-spec", "openvino", "optimum-intel", "optimum", "nncf", "transformers", "tokenizers", "torch", "gguf",
    "huggingface-hub", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy",
)  # fmt: skip


@dataclass(frozen=True)
class TargetOptions:
    """Options for the export of a target.

    tokenizer: a folder or GGUF file with the tokenizer, if the source has no usable tokenizer.
    max_context: tokens of context, if the source's configuration does not say.
    allow_pickle: read the tensors of pytorch_model*.bin, where there are no safetensors.
    """

    weights: WeightOptions = field(default_factory=WeightOptions)
    tokenizer: Path | None = None
    max_context: int | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.max_context is not None:
            check_whole("--max-context", self.max_context, InputError, "give another", most=CONTEXT_MOST)
        if self.tokenizer is not None and not self.tokenizer.exists():
            raise InputError(f"--tokenizer {self.tokenizer} does not exist: give a folder or a GGUF file")


def export_target(
    location: str, out: Path, *, name: str | None = None, revision: str | None = None,
    options: TargetOptions | None = None, resume: bool = False, force: bool = False, progress: Progress = silent,
) -> Manifest:  # fmt: skip
    """Export the target at `location` (see sources) as a pair without a drafter at `out`.

    Raises SourceError, InputError or ExportError, and leaves `out` unchanged.
    """
    options = options or TargetOptions()
    with PairBuild(out, resume=resume, force=force, progress=progress) as build:
        progress(f"looking at {location}")
        source = resolve_source(location, revision, options.allow_pickle)
        facts = build_target(build, source, options)
        provenance = {"target": describe_target(build, source, options)}
        if resume and not force and build.finished:
            return build.finish(_repaired(build, build.finished, facts, provenance, name))
        own = name or Path(os.path.abspath(out)).name  # "." has no name
        return build.finish(Manifest(own, facts, None, {}, provenance=provenance))


def _repaired(
    build: PairBuild, old: Manifest, facts: TargetFacts, provenance: dict[str, Any], name: str | None
) -> Manifest:
    """The pair `old` with its target built again; an equal target keeps drafter, tree and name."""
    if old.drafter:
        # Only weights count, because every conversion numbers the node names in the .xml anew.
        if build.records["target"].files[TARGET_WEIGHTS] != old.files.get(TARGET_WEIGHTS):
            raise ExportError(
                f"{build.out}: the new target differs from the target that its drafter was added to: use --force, "
                "then add the drafter again with dovetail-export drafter"
            )
        build.keep("drafter")
    return replace(old, name=name or old.name, target=facts, provenance={**old.provenance, **provenance})


def build_target(build: PairBuild, source: Source, options: TargetOptions) -> TargetFacts:
    """Run the target's stages and return its facts. Raises SourceError, InputError, ExportError."""
    if source.kind == "ir" and options.weights != WeightOptions():
        flag = next(iter(options.weights.given()), "weight_format").replace("_", "-")
        raise InputError(
            f"--{flag} cannot change {source.location}, an OpenVINO IR, which keeps its weights: leave it out, or give "
            "the checkpoint that the IR was made from"
        )
    tokenizer = options.tokenizer or (source.path if source.kind == "gguf" else source.folder)
    if tokenizer.is_dir():
        check_json(tokenizer)
    inputs = {
        **_weights_inputs(source, options),
        "tokenizer": tokenizer_digest(tokenizer),
        "max_context": options.max_context,
    }

    def convert_weights(folder: Path) -> Mapping[str, Any]:
        convert(source, folder, options.weights, options.trust_remote_code, build.progress, options.verbose)
        return {}

    def fill(folder: Path) -> Mapping[str, Any]:
        ir = source.path  # without a tap
        if source.kind != "ir":
            build.run(Stage("weights", _weights_inputs(source, options), convert_weights, intermediate=True))
            ir = build.folder("weights")
        return asdict(_fill_target(ir, source, tokenizer, folder, options, build.progress))

    return parse_record(TargetFacts, build.run(Stage("target", inputs, fill)), "target")


def describe_target(build: PairBuild, source: Source, options: TargetOptions) -> dict[str, Any]:
    """Provenance of a target: its source, and the options, time and versions of its export."""
    return build.provenance_of("target") or {
        "source": {"location": source.location, **source.identity, "license": source.license},
        "options": {
            **({} if source.kind == "ir" else options.weights.to_json()),
            "tokenizer": str(options.tokenizer) if options.tokenizer else None,
            "trust_remote_code": options.trust_remote_code,
        },
        **describe_tools(),
    }


def describe_tools() -> dict[str, Any]:
    """Provenance of every export: time, command and versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [printable(word) for word in (Path(sys.argv[0]).name, *sys.argv[1:])],
        "python": sys.version.split()[0],
        "packages": versions(*PACKAGES),
    }


def _weights_inputs(source: Source, options: TargetOptions) -> dict[str, Any]:
    if source.kind == "ir":
        return {"source": source.identity, "packages": versions("openvino")}
    packages = versions("openvino", "optimum-intel", "nncf", "transformers", "torch")
    return {"source": source.identity, "weights": options.weights.to_json(), "packages": packages}


def _fill_target(
    ir: Path, source: Source, tokenizer: Path, folder: Path, options: TargetOptions, progress: Progress
) -> TargetFacts:
    progress("target: fusing projections, adding the feature tap")
    model = read_model(ir / IR_GRAPH)
    _check_positions(model, read_config(ir), options)
    fuse_projections(model, apart=find_head(model))
    tap = add_tap(model)
    check_verifiable(model)
    progress("target: writing the graph")
    save_ir(model, folder / IR_GRAPH)
    for name in ("config.json", "generation_config.json"):
        own = source.folder / name
        if (origin := own if source.kind != "gguf" and own.is_file() else ir / name).is_file():
            shutil.copyfile(origin, folder / name)
    progress("target: copying and checking the tokenizer")
    eos_token_ids: tuple[int, ...] = ()
    encode = None
    if tokenizer.is_file():
        from dovetail.exporter.target.gguf.tokenizer import write_gguf_tokenizer  # only GGUF files need gguf

        eos_token_ids = write_gguf_tokenizer(tokenizer, folder)
        _name_ends(folder, eos_token_ids)
    else:
        encode = copy_tokenizer(tokenizer, folder, trust=options.trust_remote_code)
    probe_tokenizer(folder, encode)
    facts = _facts(model, tap, folder, source, options, eos_token_ids)
    del model  # its fused weights are copies in memory, beside which the comparison packs weights of its own
    if original_context(read_config(folder)) == facts.max_context:
        progress(f"target: the context ends at {facts.max_context} tokens, where the factors of long RoPE change")
    progress("target: comparing the graph with the model")
    tokens = probe_tokens(read_config(folder))
    float_logits = np.load(ir / REFERENCE) if (ir / REFERENCE).is_file() else None
    if float_logits is not None and options.weights.is_float:
        probe_graph(folder / IR_GRAPH, tokens, float_logits)
    else:
        probe_graph(folder / IR_GRAPH, tokens, ir_logits(ir / IR_GRAPH, tokens), float_logits)
    return facts


def _facts(
    model: ov.Model, tap: str, folder: Path, source: Source, options: TargetOptions, eos_token_ids: tuple[int, ...]
) -> TargetFacts:
    config = read_config(folder)
    inner = text_config(config, folder / "config.json")
    try:
        return TargetFacts(
            model_type=str(config["model_type"]),
            hidden_size=_first(inner, *WIDTH_KEYS),
            feature_size=static_size(find_head(model).input_value(0).get_partial_shape(), "features"),
            vocab_size=static_size(model.output(LOGITS).get_partial_shape(), "logits"),
            num_layers=_first(inner, *LAYER_KEYS),
            max_context=_context(config, options, source),
            weight_format=detect_weight_format(model) if source.kind == "ir" else options.weights.weight_format,
            taps=(tap,),
            eos_token_ids=eos_token_ids or _eos_token_ids(folder, inner),
            tokenizer_sha256=sha256_file(folder / TOKENIZER),
        )
    except KeyError as error:
        raise SourceError(f"config.json of {source.location} has no {error}: give a causal language model") from error


def detect_weight_format(model: ov.Model) -> str:
    """The format of most of a graph's weights, by optimum's name."""
    names = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "u8": "int8", "i8": "int8", "u4": "int4", "i4": "int4"}
    counts = Counter[str]()  # values, not bytes: embedding and head of a four-bit model have 8 bits
    for node in model.get_ops():
        if node.get_type_name() == "Constant":
            kind = node.get_element_type().get_type_name()
            counts[names.get(kind, kind)] += math.prod(node.get_output_shape(0))
    return max(counts, key=lambda name: counts[name])


def save_ir(model: ov.Model, xml: Path) -> None:
    """Write an IR without compression. Raises OSError for a full disk, which OpenVINO hides."""
    import openvino as ov

    needed = sum(node.get_byte_size() for node in model.get_ops() if node.get_type_name() == "Constant")
    try:
        ov.save_model(model, xml, compress_to_fp16=False)
    except RuntimeError as error:
        if shutil.disk_usage(xml.parent).free < needed + 2**24:
            raise OSError(28, "No space left on device", str(xml)) from error
        raise ExportError(f"OpenVINO could not write {xml}: {str(error).strip().splitlines()[-1]}") from error


def check_verifiable(model: ov.Model) -> None:
    """Raise ExportError if a target is not stateful or OpenVINO cannot make its attention paged."""
    if not model.get_sinks():
        raise ExportError(
            "the IR is not stateful (its KV cache is among the inputs): export it without --disable-stateful"
        )
    try:
        to_paged(model.clone())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ExportError(f"OpenVINO cannot turn this graph into a tree verifier: {reason}") from error


def _check_positions(model: ov.Model, config: Mapping[str, Any], options: TargetOptions) -> None:
    """Refuse a context longer than the position table. Raises InputError or SourceError."""
    rows = position_rows(model)
    if rows is None:
        return
    claimed = context_of(config) or rows
    limit = min(rows, claimed)
    if options.max_context is not None and options.max_context > limit:
        raise InputError(
            f"--max-context {options.max_context} passes the end of the model's table of {limit} positions: "
            f"give {limit} or less"
        )
    if options.max_context is None and claimed > rows:
        raise SourceError(
            f"config.json names a context of {claimed} tokens, but the model's table has {rows} positions: "
            f"give --max-context {rows}"
        )


def _eos_token_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids from generation_config.json, else from the model's `config`."""
    generation = read_object(folder / "generation_config.json", SourceError, "copy or download it again")
    ids = generation.get("eos_token_id")
    ids = config.get("eos_token_id") if ids is None else ids
    return check_token_ids(f"eos_token_id of {folder}", ids, SourceError, "copy or download it again")


def _name_ends(folder: Path, ids: tuple[int, ...]) -> None:
    """Write the ids that end an answer into the configurations, for other readers of the folder."""
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if ids and path.is_file():
            content = read_object(path, SourceError, "copy or download it again")
            path.write_text(json.dumps({**content, "eos_token_id": list(ids)}, indent=2) + "\n")


def tokenizer_digest(tokenizer: Path) -> dict[str, str]:
    """Digests of the files that a tokenizer is made of. tokenizer: a folder or GGUF file. Raises SourceError."""
    if tokenizer.is_file():
        return {tokenizer.name: sha256_file(tokenizer)}
    names = [name for name in (*TOKENIZER_FILES, "generation_config.json") if (tokenizer / name).is_file()]
    for name in names:
        check_fetched(tokenizer / name)
    return {name: sha256_file(tokenizer / name) for name in names}


def static_size(shape: ov.PartialShape, what: str) -> int:
    """Return the last size of `shape`, named `what`. Raises ExportError if the size is dynamic."""
    last = shape[len(shape) - 1]
    if last.is_dynamic:
        raise ExportError(f"the size of the {what} is not fixed in the graph: export the model again with optimum")
    return int(last.get_length())


def _first(config: Mapping[str, Any], *keys: str) -> int:
    for key in keys:
        if key in config:
            return int(config[key])  # read_config has checked it
    raise KeyError(keys[0])


def _context(config: Mapping[str, Any], options: TargetOptions, source: Source) -> int:
    """Tokens of context. Raises InputError or SourceError."""
    original = original_context(config)
    if original and options.max_context and options.max_context > original:
        raise InputError(
            f"--max-context {options.max_context} passes the original context {original} of a model with long RoPE, "
            f"whose factors change there: give {original} or less"
        )
    if context := options.max_context or context_of(config):
        return context
    raise SourceError(f"config.json of {source.location} names no context length: give --max-context")
