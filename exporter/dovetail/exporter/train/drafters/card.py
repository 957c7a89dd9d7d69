"""The model card of a trained EAGLE-3 drafter: the README.md that model hubs show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dovetail.models.eagle3 import Eagle3Drafter

_CARD = """---
base_model: {base_model}
library_name: dovetail
tags:
- eagle3
- speculative-decoding
---

# EAGLE-3 drafter for {name}

This drafter proposes tokens to {name}, which verifies them. It reads the outputs of the target's
layers {taps} (the first layer is 0) and proposes {draft_vocab} of the target's {vocab} tokens.
vLLM, SGLang, openvino-genai (after `optimum-cli export openvino`) and Dovetail load it.

```bash
dovetail-export drafter PAIR --checkpoint FOLDER
```

## How it was trained

`dovetail-export train --format eagle3` trained it on {name}'s own text:

| | |
|---|---:|
{rows}

The loss sums {decay}^i times the soft cross-entropy of step i against the target's distribution
over the draft vocabulary. Positions whose token is outside the draft vocabulary do not count.

## Acceptance

On held-out text a greedy chain of {depth} tokens has the acceptance length {length:.2f}, with the
target's own token. The i-th token is kept in {kept}% of the chains.
"""


def model_card(name: str, drafter: Eagle3Drafter, log: Mapping[str, Any]) -> str:
    """The card in Markdown, with YAML in front. name: of the target. log: content of training.json."""
    plan, corpus, held_out = log["plan"], log["corpus"], log["held_out"]
    fit = plan["fit"]
    facts = {
        "trained parameters": f"{log['parameters']:,}",
        "answer tokens": f"{corpus['trained_on']['answer_tokens']:,}",
        "minutes of fitting": f"{log['minutes']['fit']:g}",
        "updates": f"{log['updates']:,}",
        "conversations per update": fit["batch"],
        "unrolled steps": fit["unroll"],
        "optimizer and learning rate": f"{fit['optimizer']}, {fit['learning_rate']:g}",
    }
    if plan["init"]:
        facts["start"] = f"another checkpoint (`{plan['init'].rpartition('/')[2]}`)"
    rates = held_out["accepted_per_position"]
    return _CARD.format(
        base_model=json.dumps(name),
        name=name,
        taps=", ".join(map(str, drafter.config.taps)),
        draft_vocab=f"{drafter.shape.draft_vocab_size:,}",
        vocab=f"{drafter.shape.vocab_size:,}",
        rows="\n".join(f"| {what} | {value} |" for what, value in facts.items()),
        decay=fit["decay"],
        depth=len(rates),
        length=held_out["acceptance_length"],
        kept=", ".join(f"{100 * rate:.0f}" for rate in rates),
    )
