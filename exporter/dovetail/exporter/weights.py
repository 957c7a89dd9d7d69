"""A checkpoint becomes an OpenVINO IR, through optimum-intel's public API.

Only this module imports torch, transformers and optimum, and only when a checkpoint is converted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from pickle import PickleError
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from dovetail.exporter.progress import quiet
from dovetail.exporter.sources import Source, check_gguf
from dovetail.exporter.stages import Progress
from dovetail.runtime.errors import DovetailError, ExportError, InputError, SourceError

if TYPE_CHECKING:
    from optimum.intel import OVWeightQuantizationConfig

WEIGHT_FORMATS = ("fp32", "fp16", "int8", "int4", "mxfp4", "nf4", "cb4")
TASK = "text-generation-with-past"
# What transformers, optimum and nncf raise on a model that they cannot convert.
_CONVERSION_ERRORS = (
    RuntimeError, ValueError, LookupError, AttributeError, TypeError, AssertionError, ArithmeticError, EOFError,
    MemoryError, PickleError, BadZipFile,
)  # fmt: skip


@dataclass(frozen=True)
class WeightOptions:
    """How weights are stored, named and meant as in `optimum-cli export openvino`; None is its default."""

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
            raise InputError(f"weight format {self.weight_format!r} is unknown: one of {', '.join(WEIGHT_FORMATS)}")
        given = self.given()
        if given and self.weight_format in ("fp32", "fp16"):
            raise InputError(f"--{given[0].replace('_', '-')} has no meaning with {self.weight_format}: drop it")

    def given(self) -> list[str]:
        """Names of the options that were set."""
        return [f.name for f in fields(self) if f.name != "weight_format" and getattr(self, f.name) is not None]

    def to_json(self) -> dict[str, Any]:
        """The options that were set, for provenance."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def convert(
    source: Source, folder: Path, options: WeightOptions, trust: bool, progress: Progress, verbose: bool
) -> None:
    """Write openvino_model.xml/.bin, config.json and generation_config.json of `source` into `folder`.

    trust: run Python code that comes with the checkpoint. Needs the `export` extra.
    Raises SourceError (unreadable or unsupported checkpoint), InputError (options) or ExportError.
    """
    progress("loading torch, transformers and optimum")
    with quiet(verbose), _one_line_errors(source):
        checkpoint = _gguf_to_hf(source, progress) if source.kind == "gguf" else source.path
        if options.weight_format in ("fp32", "fp16"):
            _export_plain(checkpoint, folder, options.weight_format, trust, progress)
        else:
            _export_compressed(source, checkpoint, folder, options, trust, progress)


def _export_plain(checkpoint: Path, folder: Path, dtype: str, trust: bool, progress: Progress) -> None:
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    progress(f"tracing the model, {dtype}")
    config = OVConfig(dtype=dtype)
    main_export(str(checkpoint), folder, task=TASK, ov_config=config, stateful=True, trust_remote_code=trust)


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


def _quantization(source: Source, options: WeightOptions) -> OVWeightQuantizationConfig:
    """The configuration that `optimum-cli export openvino` would build from the same flags."""
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


def _gguf_to_hf(source: Source, progress: Progress) -> Path:
    """Dequantise a GGUF file into a temporary Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM

    architecture = check_gguf(source.path)
    progress("reading the GGUF file")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(source.folder), gguf_file=source.path.name, dtype=torch.float32, local_files_only=True,
            trust_remote_code=False,
        )  # fmt: skip
    except (ValueError, KeyError, NotImplementedError) as error:
        raise SourceError(
            f"{source.path}: transformers cannot read this GGUF ({architecture}): {_first_line(error)}"
        ) from error
    folder = Path(tempfile.mkdtemp(prefix="hf-"))
    progress("writing the dequantised checkpoint")
    model.save_pretrained(folder)
    return folder


@contextmanager
def _one_line_errors(source: Source) -> Iterator[None]:
    """What the libraries raise on a checkpoint they cannot convert, as one line; OSError passes."""
    try:
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError
    except ImportError as error:
        raise ExportError(f"converting a checkpoint needs {error.name}: pip install 'dovetail-spec[export]'") from error
    try:
        yield
    except DovetailError:
        raise
    except OSError as error:
        if error.errno is None:  # transformers' own: a file of the checkpoint is missing or malformed
            raise SourceError(f"{source.location} is no usable checkpoint: {_first_line(error)}") from error
        raise
    except ImportError as error:
        raise ExportError(
            f"converting a checkpoint needs {error.name or error}: pip install 'dovetail-spec[export]'"
        ) from error
    except SafetensorError as error:
        if "os error 28" in str(error):
            raise OSError(28, "No space left on device") from error
        raise SourceError(f"{source.location}: unreadable weights: {_first_line(error)}") from error
    except StrictDataclassError as error:  # a value in config.json is of another type than the model's
        raise SourceError(f"{source.location}: config.json: {' '.join(str(error).split())}") from error
    except _CONVERSION_ERRORS as error:
        raise ExportError(f"{source.location} could not be converted: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
