"""The model card of a pair on the Hub, written from the pair's manifest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dovetail.exporter.pairs.reference import REFERENCE_PAIRS
from dovetail.runtime.pair.manifest import Manifest

CARD = "README.md"
MARK = "<!-- Written by dovetail-export push, which replaces this page as long as this line stands. -->"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # the form of the Hub's names of licences
_PACKAGES = ("dovetail-spec", "openvino", "optimum-intel", "nncf", "transformers", "torch", "onnx")


def write_card(manifest: Manifest, repo: str, revision: str | None = None) -> str:
    """Return the card: metadata for the Hub, how to run the pair, and what the manifest says."""
    from huggingface_hub import ModelCardData

    target, model, licence = manifest.target, base_model(manifest), _source(manifest).get("license")
    known = isinstance(licence, str) and _LICENSE.fullmatch(licence)
    quantised = model and not target.weight_format.startswith(("fp", "bf"))
    metadata = ModelCardData(
        base_model=model,
        library_name="dovetail",
        license=licence if known else None,  # the Hub refuses a card with another
        pipeline_tag="text-generation",
        tags=["dovetail", "openvino", "speculative-decoding", target.weight_format],
        base_model_relation="quantized" if quantised else None,
    )
    folder, at = repo.split("/")[-1], f" --revision {revision}" if revision else ""
    drafting = "and a drafter that speeds it up" if manifest.drafter else "which drafts text that repeats itself"
    rows = "\n".join(f"| {what} | {_cell(value)} |" for what, value in _facts(manifest).items())
    return f"""---
{metadata.to_yaml().strip()}
---

{MARK}

# {_cell(manifest.name)}

This is a Dovetail pair: a target for the CPU under OpenVINO, {drafting}.

## Run

```bash
dovetail-export pull {repo} ./{folder}{at}
dovetail-run -m ./{folder} "Why is the sky blue?"
```

```python
from dovetail.runtime import Engine

with Engine.from_pretrained("{folder}") as engine:
    print(engine.generate("Why is the sky blue?").text)
```

## Contents

| | |
|---|---|
{rows}

{_licence(manifest, licence)}
"""


def base_model(manifest: Manifest) -> str | None:
    """The Hub id of the model that the target was exported from; None if the pair does not know."""
    reference = _object(manifest.provenance.get("reference")).get("pair")
    known = REFERENCE_PAIRS.get(reference) if isinstance(reference, str) else None
    repo = _source(manifest).get("repo")
    return repo if isinstance(repo, str) else known.hub_id if known else None


def _facts(manifest: Manifest) -> dict[str, str]:
    target, drafter, exported = manifest.target, manifest.drafter, _object(manifest.provenance.get("target"))
    packages, commit = _object(exported.get("packages")), _source(manifest).get("revision")
    model = base_model(manifest)
    facts = {
        "target": f"{target.model_type}, {target.num_layers} layers, vocabulary {target.vocab_size}, "
        f"context {target.max_context} tokens",
        "base model": f"{model}{f', commit {commit}' if commit else ''}" if model else None,
        "weight format": target.weight_format,
        "drafter": "none"
        if drafter is None
        else f"{manifest.drafter_kind or 'a drafter'}, {drafter.blocks} block(s), "
        f"draft vocabulary {drafter.draft_vocab_size}",
        "size": f"{sum(entry.size for entry in manifest.files.values()) / 1e9:.2f} GB",
        "exported": exported.get("date"),
        "versions": ", ".join(f"{name} {packages[name]}" for name in _PACKAGES if packages.get(name)),
        "manifest": f"`dovetail.json`, format {manifest.format_version}",
    }
    return {what: str(value) for what, value in facts.items() if value}


def _licence(manifest: Manifest, licence: object) -> str:
    said = "The pair does not say under which licence its base model is: read the page of the base model."
    if licence:
        said = f"The licence of the base model, {_cell(licence)}, holds for this pair."
    if manifest.drafter and manifest.drafter.reads_tokens:
        said += " The drafter is a language model of its own, whose licence holds too."
    return said


def _source(manifest: Manifest) -> Mapping[str, Any]:
    return _object(_object(manifest.provenance.get("target")).get("source"))


def _object(value: object) -> Mapping[str, Any]:
    """`value` if it is an object: nothing else checks a manifest's provenance."""
    return value if isinstance(value, dict) else {}


def _cell(value: object) -> str:
    """Text of a manifest for one cell of a Markdown table, without marks that make more of it."""
    text = " ".join(str(value).split())
    return "".join(f"\\{mark}" if mark in "|<>[]\\" else mark for mark in text)
