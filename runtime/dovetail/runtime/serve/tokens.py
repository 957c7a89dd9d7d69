"""/tokenize and /detokenize, with vLLM's fields."""

from __future__ import annotations

import asyncio
from typing import Any

from dovetail.runtime.serve.conversation import Conversation, as_dicts
from dovetail.runtime.serve.failures import ApiError
from dovetail.runtime.serve.openai import DetokenizeRequest, TokenizeRequest
from dovetail.runtime.serve.service import Service
from dovetail.runtime.text.encoding import encode_prompt


async def tokenize(service: Service, asked: TokenizeRequest) -> dict[str, Any]:
    """Return the ids of a prompt or of messages, which have no additions but the template's."""
    service.check_model(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    if asked.prompt is not None:
        ids = await asyncio.to_thread(
            service.tokenizer.encode, asked.prompt, add_special_tokens=asked.add_special_tokens
        )
    else:
        conversation = Conversation(
            messages=as_dicts(asked.messages or ()),
            tools=[tool.function for tool in asked.tools or ()],
            template=asked.chat_template_kwargs or {},
        )
        options = {**conversation.template_options(), "add_generation_prompt": asked.add_generation_prompt}
        ids = await asyncio.to_thread(
            encode_prompt, service.tokenizer, conversation.messages, False, options, parse_special=False
        )
    strings = None
    if asked.return_token_strs:
        strings = [service.spellings[token].text.decode(errors="replace") for token in ids]
    return {"count": len(ids), "max_model_len": service.engine.max_context, "tokens": ids, "token_strs": strings}


async def detokenize(service: Service, asked: DetokenizeRequest) -> dict[str, Any]:
    """Return the text of token ids, special tokens included."""
    service.check_model(asked.model)
    for token in asked.tokens:
        if not service.tokenizer.has_token(token):
            raise ApiError(400, f"tokens has {token}, which is none of the model's", param="tokens")
    text = await asyncio.to_thread(service.tokenizer.decode, asked.tokens, skip_special_tokens=False)
    return {"prompt": text}
