"""Resolves the checkpoint of a drafter: a folder, a GGUF file, or a Hub id."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.exporter.hub import download, hub_errors, is_hub_id
from dovetail.exporter.target.configuration import read_config
from dovetail.exporter.target.sources import CONFIG, check_shards, choose_weights
from dovetail.runtime.errors import SourceError, one_line
from dovetail.runtime.pair.layout import CALIBRATION_NAME
from dovetail.runtime.system.files import read_object

if TYPE_CHECKING:
    from dovetail.models.checkpoint import Stored

MOST_BYTES = 16 << 30  # of weights; the largest drafters of targets with 100B parameters have a few GiB
LOG = "training.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
REPORT_FILES = (*TOKENIZER_FILES, LOG)
PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth")  # in the order of preference


def resolve_checkpoint(location: str, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """Return the folder of a drafter's checkpoint; download a Hub id into the Hugging Face cache.

    A GGUF file is converted into Dovetail's cache. A Hub id is `owner/name`. config.json comes
    first, and then the weights and the calibration alone. allow_pickle: take pickled weights where
    there are no safetensors. Raises SourceError.
    """
    path = Path(os.path.expanduser(location))
    if path.is_file() and path.suffix == ".gguf" and not revision:
        from dovetail.exporter.drafter.gguf_checkpoint import converted  # only GGUF files need gguf

        return converted(path)
    if path.exists() or "/" not in location or not is_hub_id(location):
        if revision:
            raise SourceError(
                f"--revision {revision!r} needs a Hub id, but {location!r} is none: drop --revision, or give a Hub id"
            )
        names = {file.name for file in path.iterdir()} if path.is_dir() else {CONFIG}
        if CONFIG in names and names != {CONFIG}:
            choose_weights(location, names, allow_pickle, PICKLED)
        return path

    def choose(sizes: Mapping[str, int], fetch: Callable[[str], Path]) -> list[str]:
        return _needed(location, sizes, fetch, allow_pickle)

    folder = download(location, revision, choose)
    check_shards(folder, [file.name for file in folder.iterdir() if file.is_file()])
    return folder


def read_remote(repo: str, revision: str | None = None) -> Stored:
    """The config and the shapes of a drafter on the Hub, by the headers of its safetensors alone.

    Its folder holds config and tokenizer. Raises SourceError, also for pickled weights, which have
    no header.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    from dovetail.models.checkpoint import Stored, check_kind  # torch, which --help does without

    weights: list[str] = []

    def choose(sizes: Mapping[str, int], fetch: Callable[[str], Path]) -> list[str]:
        needed = _needed(repo, sizes, fetch, allow_pickle=False)
        weights[:] = [name for name in needed if name.endswith(".safetensors")]
        return [name for name in sizes if (name in needed and name not in weights) or name in REPORT_FILES]

    folder = download(repo, revision, choose)
    shapes: dict[str, tuple[int, ...]] = {}
    with hub_errors(repo, revision):
        for name in weights:
            try:
                header = HfApi().parse_safetensors_file_metadata(repo, name, revision=folder.name)
            except SafetensorsParsingError as error:
                raise SourceError(
                    f"{name} of {repo} is no safetensors file ({one_line(error)}): tell its owner"
                ) from error
            for key, tensor in header.tensors.items():
                check_kind(key, tensor.dtype, tensor.shape, Path(repo))
                shapes[key] = tuple(tensor.shape)
    return Stored(folder, read_config(folder), shapes, (CONFIG, *weights))


def _needed(repo: str, sizes: Mapping[str, int], fetch: Callable[[str], Path], allow_pickle: bool) -> list[str]:
    """Names of the files of a repository that a drafter's export reads. Raises SourceError."""
    from dovetail.models.formats.language_model import ARCHITECTURES  # torch, which --help does without
    from dovetail.models.formats.reading import architectures

    if CONFIG not in sizes:
        raise SourceError(f"{repo} has no {CONFIG}, so it is no drafter: give a repository with a trained drafter")
    config = read_config(fetch(CONFIG).parent)
    top = [name for name in sizes if "/" not in name]
    weights = choose_weights(repo, top, allow_pickle, PICKLED)
    suffix = Path(weights[0]).suffix
    index = f"{'model' if suffix == '.safetensors' else 'pytorch_model'}{suffix}.index.json"
    if index in top:
        listed = read_object(fetch(index), SourceError, "download it again").get("weight_map")
        weights = [name for name in weights if isinstance(listed, dict) and name in listed.values()]
    elif len(weights) > 1:
        raise SourceError(
            f"{repo} has {len(weights)} files of weights ({', '.join(weights[:3])}) and no index: keep one"
        )
    if (size := sum(sizes[name] for name in weights)) > MOST_BYTES:
        raise SourceError(f"{repo} has {size / 1e9:.0f} GB of weights, more than any drafter: give the id of a drafter")
    others = [index, CALIBRATION_NAME]
    if not {*ARCHITECTURES}.isdisjoint(architectures(config)):  # the tokenizer is compared with the target's
        others += TOKENIZER_FILES
    return [CONFIG, *weights, *(name for name in others if name in top)]
