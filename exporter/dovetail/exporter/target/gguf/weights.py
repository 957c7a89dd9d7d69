"""Writes a GGUF model as a Hugging Face folder, and checks that both have the same tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.exporter.target.gguf.config import ROPE_FACTORS, gguf_config
from dovetail.exporter.target.gguf.header import GgufHeader

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def write_checkpoint(header: GgufHeader, folder: Path) -> None:
    """Write config.json and the dequantised weights, a file per block, to `folder`.

    Raises SourceError before it reads weights if the file and the model differ in tensors.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    config = gguf_config(header)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config)
    names = get_gguf_hf_weights_map(model, processor)
    targets = _targets(header, model, names)
    files: dict[str, str] = {}

    def block(name: str) -> str:
        return name.split(".")[1] if name.startswith("blk.") else ""

    for index, (_, shard) in enumerate(groupby(sorted(targets, key=block), key=block)):
        taken: dict[str, torch.Tensor] = {}
        for name in shard:
            tensor = header.tensors[name]
            try:
                values = tensor.read()
            except NotImplementedError as error:
                raise header.error(f"{name} has type {tensor.kind.name}, which gguf cannot read") from error
            result = processor.process(
                weights=values,
                name=name,
                tensor_key_mapping=names,
                parsed_parameters={"tensors": taken},  # the processor puts merged experts there, without a name
            )
            if result.name is not None:
                taken[targets[name]] = torch.from_numpy(result.weights.copy())
        file = f"model-{index:05}.safetensors"
        save_file({name: value.contiguous() for name, value in taken.items()}, folder / file, {"format": "pt"})
        files |= dict.fromkeys(taken, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(
        json.dumps({**config, "dtype": "float32", "architectures": [type(model).__name__]}, indent=2)
    )


def _targets(header: GgufHeader, model: PreTrainedModel, names: Mapping[str, str]) -> dict[str, str]:
    """The model's name of each tensor of the file. Raises SourceError if the tensors differ."""
    targets: dict[str, str] = {}
    unknown = []
    for name in header.tensors:
        target = names.get(name, names.get(name.removesuffix(".weight")))
        if target is not None:
            targets[name] = target
        elif name != ROPE_FACTORS or not getattr(model.config, "rope_parameters", None):
            unknown.append(name)
    if unknown:
        raise header.error(f"{model.config.model_type} has no tensor for {_listed(unknown)}")
    sizes = dict.fromkeys(targets.values(), 0)
    for name, target in targets.items():
        sizes[target] += math.prod(header.tensors[name].shape)
    expected = {name: value.numel() for name, value in model.state_dict().items()}
    for tied in model.all_tied_weights_keys:
        expected.pop(tied, None)
    theirs = {target: name for name, target in names.items()}
    if missing := [theirs.get(name, name) for name in expected if name not in sizes]:
        raise header.error(f"lacks {_listed(missing)}, as an incomplete download does")
    for name, target in targets.items():
        if target in expected and sizes[target] != expected[target]:
            raise header.error(
                f"{name} of shape {header.tensors[name].shape} does not fit {model.config.model_type} with the sizes "
                "that the file names"
            )
    return targets


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
