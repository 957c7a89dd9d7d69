"""A GGUF with all its matrices as Q8_0, for engines that are to be compared at eight bits.

    python tests/bench/gguf_q8.py MODEL.gguf MODEL-Q8_0.gguf

Metadata and vectors are copied; matrices are dequantised and quantised again, so nothing is gained but speed's footing.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

SET_BY_WRITER = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("target", type=click.Path(path_type=Path, dir_okay=False))
def main(source: Path, target: Path) -> None:
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    writer.add_file_type(7)  # mostly Q8_0
    writer.add_quantization_version(2)
    for name, field in reader.fields.items():
        if not name.startswith(SET_BY_WRITER):
            kind = field.types[0]
            inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        weights = dequantize(tensor.data, tensor.tensor_type)
        if weights.ndim == 1:
            writer.add_tensor(tensor.name, weights.astype(np.float32))
        else:
            data = quantize(weights, GGMLQuantizationType.Q8_0)
            writer.add_tensor(tensor.name, data, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
