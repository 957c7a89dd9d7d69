"""Converts a checkpoint to an OpenVINO IR through optimum-intel's public API.

A conversion imports torch, transformers and optimum; the import of this module does not.
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from pickle import PickleError
from typing import Any
from zipfile import BadZipFile

import numpy as np

from dovetail.exporter.build.progress import quiet
from dovetail.exporter.target.configuration import read_config
from dovetail.exporter.target.graph_probe import probe_tokens, torch_logits
from dovetail.exporter.target.sources import Source
from dovetail.runtime.errors import DovetailError, ExportError, InputError, SourceError, install_extra
from dovetail.runtime.system.progress import Progress

WEIGHT_FORMATS = ("fp32", "fp16", "int8", "int4", "mxfp4", "nf4", "cb4")
REFERENCE = "reference.npy"  # logits of the checkpoint itself, for graph_probe
TASK = "text-generation-with-past"
# Tables in older checkpoints that models now compute themselves: RoPE and the causal mask.
_INERT_TENSORS = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|\b(attn|attention)\.(bias|masked_bias|causal_mask)|"
    r"\bposition_ids|_extra_state)$"
)
# Errors of transformers, optimum and nncf for a model that they cannot convert.
_CONVERSION_ERRORS = (
    RuntimeError, ValueError, LookupError, AttributeError, TypeError, AssertionError, ArithmeticError, MemoryError,
)  # fmt: skip
# Errors of torch's unpickler for a damaged pytorch_model.bin.
_DAMAGED_PICKLE = (EOFError, PickleError, BadZipFile, IndexError, struct.error)


@dataclass(frozen=True)
class WeightOptions:
    """Options for weights, as in `optimum-cli export openvino`; None is optimum-cli's default."""

    weight_format: str = "int8"
    sym: bool | None = None
    group_size: int | None = None
    group_size_fallback: str | None = None
    ratio: float | None = None
    all_layers: bool | None = None
    backup_precision: str | None = None
    awq: bool | None = None
    scale_estimation: bool | None = None
    gptq: bool | None = None
    lora_correction: bool | None = None
    sensitivity_metric: str | None = None
    dataset: str | None = None
    num_samples: int | None = None

    def __post_init__(self) -> None:
        if self.weight_format not in WEIGHT_FORMATS:
            raise InputError(f"weight format {self.weight_format!r} is none of {', '.join(WEIGHT_FORMATS)}: choose one")
        given = self.given()
        if given and self.is_float:
            raise InputError(
                f"--{given[0].replace('_', '-')} has no meaning with {self.weight_format}: drop the option"
            )

    @property
    def is_float(self) -> bool:
        return self.weight_format in ("fp32", "fp16")

    def given(self) -> list[str]:
        return [f.name for f in fields(self) if f.name != "weight_format" and getattr(self, f.name) is not None]

    def to_json(self) -> dict[str, Any]:
        """The options that the user set, for provenance."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def convert(
    source: Source, folder: Path, options: WeightOptions, trust: bool, progress: Progress, verbose: bool
) -> None:
    """Write the IR of `source`, its configurations and reference logits to `folder`.

    trust: run Python code that comes with the checkpoint.
    Raises SourceError (unreadable or unsupported checkpoint), InputError (options) or ExportError.
    """
    progress("loading torch, transformers and optimum")
    with quiet(verbose), _one_line_errors(source):
        checkpoint = source.path
        if source.kind == "gguf":
            from dovetail.exporter.target.gguf.header import read_model
            from dovetail.exporter.target.gguf.weights import write_checkpoint

            progress("reading the GGUF file")
            checkpoint = Path(tempfile.mkdtemp(prefix="hf-"))
            write_checkpoint(read_model(source.path), checkpoint)
        progress("comparing the checkpoint's tensors with the model's")
        check_tensors(source.location, checkpoint, trust)
        if options.is_float:
            from optimum.exporters.openvino import main_export
            from optimum.intel import OVConfig

            progress(f"tracing the model, {options.weight_format}")
            config = OVConfig(dtype=options.weight_format)
            main_export(str(checkpoint), folder, task=TASK, ov_config=config, stateful=True, trust_remote_code=trust)
        else:
            _export_compressed(source, checkpoint, folder, options, trust, progress)
        if options.is_float or options.weight_format == "int8":  # 4-bit weights differ too much for a comparison
            progress("computing reference logits with the checkpoint")
            tokens = probe_tokens(read_config(checkpoint))
            np.save(folder / REFERENCE, torch_logits(checkpoint, tokens, trust))


def _export_compressed(
    source: Source, checkpoint: Path, folder: Path, options: WeightOptions, trust: bool, progress: Progress
) -> None:
    from optimum.intel import OVModelForCausalLM

    try:
        config = _quantization(source, options)
    except ValueError as error:
        raise InputError(f"weight options: {_first_line(error)}") from error
    progress(f"tracing the model and compressing it to {options.weight_format}")
    model = OVModelForCausalLM.from_pretrained(
        str(checkpoint), export=True, compile=False, quantization_config=config, trust_remote_code=trust
    )
    progress("writing the IR")
    model.save_pretrained(folder)


def _quantization(source: Source, options: WeightOptions) -> Any:
    """The OVWeightQuantizationConfig that optimum-cli builds from the same flags."""
    from optimum.intel import OVWeightQuantizationConfig
    from optimum.intel.openvino.configuration import get_default_quantization_config

    dtype = options.weight_format
    if not options.given() and dtype in ("int8", "int4"):
        if known := get_default_quantization_config(source.repo or str(source.path), weight_format=dtype):
            return OVWeightQuantizationConfig(**known)
        if dtype == "int4":
            return OVWeightQuantizationConfig(bits=4, sym=False, group_size=128, ratio=1.0)
    wanted = options.to_json()
    del wanted["weight_format"]
    wanted["quant_method"] = "awq" if wanted.pop("awq", False) else "default"
    if dtype == "int8":
        wanted.setdefault("group_size", -1)
    return OVWeightQuantizationConfig(bits=8 if dtype == "int8" else 4, dtype=dtype, **wanted)


def check_tensors(location: str, checkpoint: Path, trust: bool = False) -> None:
    """Raise SourceError if checkpoint and model differ in tensors or shapes.

    transformers fills missing tensors with random numbers and skips unknown tensors. The comparison
    reads no weights: tensors on the device "meta" have names and shapes only.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from transformers import AutoModelForCausalLM

    class Differs(TorchFunctionMode):
        """Skips the comparison of values that transformers makes between two stored tied tables."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return False if function is torch.equal else function(*args, **(kwargs or {}))

    with Differs():
        _, found = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=trust,
            local_files_only=True,
        )
    unexpected = sorted(name for name in found["unexpected_keys"] if not _INERT_TENSORS.search(name))
    mismatched = sorted(f"{name} {tuple(theirs)} for {tuple(ours)}" for name, theirs, ours in found["mismatched_keys"])
    for names, what in (
        (sorted(found["missing_keys"]), "lacks weights of its model"),
        (unexpected, "holds weights that the model of its config.json does not have"),
        (mismatched, "holds weights of another shape than its config.json says"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise SourceError(f"{location} {what}: {', '.join(names[:3])}{more}: take all files from one checkpoint")


@contextmanager
def _one_line_errors(source: Source) -> Iterator[None]:
    """Turn the libraries' errors for a bad checkpoint into one-line errors; OSError passes."""
    try:
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError
    except ImportError as error:
        raise ExportError(f"converting a checkpoint needs {error.name}: {install_extra('export')}") from error

    def unreadable(reason: str) -> SourceError:
        return SourceError(f"{source.location}: unreadable weights: {reason}: download them again")

    try:
        yield
    except DovetailError:
        raise
    except OSError as error:
        if error.errno is None:  # from transformers: a file of the checkpoint is missing or malformed
            raise SourceError(f"{source.location} is no usable checkpoint: {_first_line(error)}") from error
        raise
    except ImportError as error:
        raise ExportError(f"converting a checkpoint needs {error.name or error}: {install_extra('export')}") from error
    except (SafetensorError, *_DAMAGED_PICKLE) as error:
        if "os error 28" in str(error):
            raise OSError(28, "No space left on device") from error
        raise unreadable(_first_line(error)) from error
    except StrictDataclassError as error:  # a value in config.json has a type that the model does not take
        raise SourceError(f"{source.location}: config.json: {' '.join(str(error).split())}") from error
    except _CONVERSION_ERRORS as error:
        if "PytorchStreamReader" in str(error):  # torch's reader of pytorch_model.bin
            raise unreadable("pytorch_model.bin is damaged") from error
        if "iostream error" in str(error):  # all that OpenVINO says of a file that it cannot write
            raise ExportError(
                f"{source.location} could not be converted: OpenVINO cannot write the graph: free as much disk space "
                "as the float weights and the exported weights take together"
            ) from error
        raise ExportError(f"{source.location} could not be converted: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
