"""Checkpoints that Dovetail recognises and does not read, each with its name and the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from dovetail.models.checkpoint import UnknownFormat
from dovetail.models.formats.format import Config
from dovetail.models.formats.language_model import ARCHITECTURES, OTHERWISE, is_language_model, is_read
from dovetail.models.formats.reading import architectures, reads_features

Mark = Callable[[Config, Collection[str]], bool]  # of a config and the tensors' names, none if unknown

_EAGLE3 = "use an EAGLE-3 drafter for the same target"
_BLOCKS = "use a DFlash or an EAGLE-3 drafter for the same target"


class RefusedDrafter(UnknownFormat):
    """A drafter that Dovetail knows and does not read, and no language model beside it."""


@dataclass(frozen=True)
class Refusal:
    """A kind of checkpoint that has one of `marks`. reason: why Dovetail does not read it, and the remedy."""

    name: str
    reason: str
    marks: tuple[Mark, ...]
    drafter: bool = True


def check_not_refused(folder: Path, config: Config, names: Collection[str] = ()) -> None:
    """Raise UnknownFormat, with the reason, for a checkpoint that Dovetail knows and does not read."""
    for refusal in REFUSED:
        if any(mark(config, names) for mark in refusal.marks):
            kind = RefusedDrafter if refusal.drafter and not is_language_model(config, names) else UnknownFormat
            raise kind(f"{folder} is {refusal.name}, which Dovetail does not read: {refusal.reason}")


def _keyed(*keys: str) -> Mark:
    """A config with one of the keys, and a value that is neither null, 0 nor empty."""
    return lambda config, names: any(config.get(key) for key in keys)


def _valued(key: str, value: object) -> Mark:
    """A config that has this value, at its top or in dflash_config."""
    return lambda config, names: any(
        isinstance(part, dict) and part.get(key) == value for part in (config, config.get("dflash_config"))
    )


def _named(*parts: str) -> Mark:
    """A tensor whose dotted name has one of the parts."""
    wanted = set(parts)
    return lambda config, names: any(not wanted.isdisjoint(name.split(".")) for name in names)


def _built(pattern: str) -> Mark:
    """A config whose architecture or model type has the pattern."""
    expression = re.compile(pattern, re.IGNORECASE)
    return lambda config, names: any(expression.search(kind) for kind in (*architectures(config), *_kind(config)))


def _kind(config: Config) -> list[str]:
    return [kind] if isinstance(kind := config.get("model_type"), str) else []


def _predicts_further(config: Config, names: Collection[str]) -> bool:
    """A model with prediction layers; the config of its drafter may repeat their number."""
    return bool(config.get("num_nextn_predict_layers") and names and not reads_features(names))


def _other_language_model(config: Config, names: Collection[str]) -> bool:
    return is_language_model(config, names) and not is_read(config, names)


# The first kind that has one of its marks is named.
REFUSED = (
    Refusal(
        "a P-EAGLE drafter",
        f"it drafts several positions in one pass, from mask tokens: {_EAGLE3}",
        (
            _valued("speculators_model_type", "peagle"), _keyed("ptd_token_id", "pard_token"), _named("mask_hidden"),
            _built("p_?eagle"),
        ),
    ),
    Refusal(
        "a DSpark drafter",
        f"its Markov and confidence heads have no place in Dovetail's graph: {_BLOCKS}",
        (
            _valued("speculators_model_type", "dspark"), _keyed("dspark_noise_token_id"),
            _named("markov_head", "confidence_head"), _built("dspark"),
        ),
    ),
    Refusal(
        "a Domino drafter",
        f"its recurrent network over the tokens has no place in Dovetail's graph: {_BLOCKS}",
        (_valued("projector_type", "domino"), _named("prefix_gru"), _built("domino")),
    ),
    Refusal(
        "a DFlash 2 drafter",
        f"its convolutions and its choice among candidates have no place in Dovetail's graph: {_BLOCKS}",
        (
            _valued("speculators_model_type", "dflash2"), _named("attention_conv", "mlp_conv", "candidate_selector"),
            _built("dflash_?2"),
        ),
    ),
    Refusal(
        "an XPress drafter",
        f"the network that refines its tokens has no place in Dovetail's graph: {_BLOCKS}",
        (_valued("speculators_model_type", "xpress"), _named("refiner_head"), _built("xpress")),
    ),
    Refusal(
        "a Medusa drafter",
        f"it has a head for each position, and no layer that reads the tokens between: {_EAGLE3}",
        (_keyed("medusa_num_heads"), _named("medusa_head", "medusa_heads", "lm_heads"), _built("medusa")),
    ),
    Refusal(
        "a Hydra drafter",
        f"it has a head for each position, and no attention: {_EAGLE3}",
        (_keyed("hydra_num_heads"), _named("hydra_head", "hydra_heads"), _built("^hydra")),
    ),
    Refusal(
        "an MLP or LSTM speculator",
        f"it has no attention, and Dovetail's graph has no drafter without attention: {_EAGLE3}",
        (_built("mlp_?speculator|lstm_?speculator|mlp_?variant_?speculator|arctic_?speculator"),),
    ),
    Refusal(
        "a set of multi-token-prediction layers (MTP)",
        f"they are layers of the model that they were trained in: {_EAGLE3}",
        (
            _valued("speculators_model_type", "mtp"), _named("mtp", "mtp_layers"), _predicts_further,
            _built("mtp(model|forcausallm)?$|nextn$"),
        ),
    ),
    Refusal(
        "a drafter with multi-head latent attention (MLA)",
        f"Dovetail's drafters have the attention of Llama or Qwen3: {_EAGLE3}",
        (_named("kv_a_proj_with_mqa"), _built(r"^eagle3?deepseek")),
    ),
    Refusal(
        "a quantised checkpoint",
        "Dovetail quantises a drafter itself: give the checkpoint in float16, bfloat16 or float32",
        (
            _keyed("quantization_config", "compression_config"),
            _named("qweight", "qzeros", "weight_scale", "weight_scale_inv", "weight_packed", "SCB", "quant_state"),
        ),
        drafter=False,
    ),
    Refusal(
        "a language model of another architecture than " + ", ".join(ARCHITECTURES),
        f"its layers have no place in Dovetail's graph: {OTHERWISE}",
        (_other_language_model,),
        drafter=False,
    ),
)  # fmt: skip
