"""Requests of OpenAI's API as Dovetail takes them, checked by pydantic.

Types are strict: "5" is no number. A field that no model names is refused, as OpenAI does, so that
a misspelt field is no silent default. Fields of class Hints are taken and change nothing.

Validation ends at the first bad item of a list: pydantic would otherwise collect millions of
errors from a body of some MB, in minutes and GB.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from dovetail.runtime.front import MOST_WIDTH
from dovetail.runtime.system.bounds import SEED_MOST, TOKEN_MOST

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
TokenId = Annotated[int, Field(ge=0, le=TOKEN_MOST)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Count = Annotated[int, Field(ge=1, le=TOKEN_MOST)]
Object = dict[str, Any]
Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]
Filled = Annotated[list[Item], Field(fail_fast=True, min_length=1)]
MOST_BIASES = 4096


class Body(BaseModel):
    """A JSON object without unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > len(cls.model_fields):
            raise ValueError(
                f"at most {len(cls.model_fields)} fields are known, and {len(value)} are given: leave out the others"
            )
        if (
            isinstance(value, dict)
            and isinstance(biases := value.get("logit_bias"), dict)
            and len(biases) > MOST_BIASES
        ):
            raise ValueError(f"logit_bias has {len(biases)} tokens, and may have {MOST_BIASES}: name fewer")
        return value


class Hints(Body):
    """Fields for OpenAI's own services. They change no answer here."""

    metadata: Object | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Object | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    user: str | None = None


class Tree(Body):
    """Limits of every tree of an answer: fields of TreeLimits."""

    width: int | None = Field(None, ge=1, le=MOST_WIDTH)
    depth: int | None = Field(None, ge=0, le=64)
    top_k: int | None = Field(None, ge=1, le=64)
    lookup: int | None = Field(None, ge=0, le=64)


class StreamOptions(Body):
    """Of a stream. Obfuscation is never added."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatStreamOptions(StreamOptions):
    """Of a stream of messages."""

    include_rounds: bool | None = Field(None, description="each chunk has the tree of its round, in `dovetail`")


class Sampling(Hints):
    """What every request for an answer may say. None is the server's default."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=TOKEN_MOST, description="0 and -1 are off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-SEED_MOST - 1, le=SEED_MOST)
    speculate: bool | None = Field(None, description="false decodes without drafts; the text is the same")
    tree: Tree | None = Field(None, description="fixes the limits of this answer's trees")

    @field_validator("stream_options")
    @classmethod
    def _check_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("needs stream: true: send that too, or leave it out")
        return value


class Choices(Sampling):
    """What both older routes share."""

    n: int | None = Field(None, ge=1, le=128)
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=64)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, value: Any) -> Any:
        """Refuse empty texts here: pydantic would say that the list is no text."""
        if value == "" or (isinstance(value, list) and "" in value):
            raise ValueError("an empty text cannot end an answer: leave it out")
        return value


class SchemaFormat(Body):
    """A named JSON schema."""

    name: Name
    schema_: Object | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    """JSON of a schema, as chat completions nest it."""

    type: Literal["json_schema"]
    json_schema: SchemaFormat


class FlatSchemaFormat(SchemaFormat):
    """JSON of a schema, as responses spell it."""

    type: Literal["json_schema"]


class Function(Body):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(Body):
    """A function, as chat completions nest it."""

    type: Literal["function"]
    function: Function


class FlatTool(Function):
    """A function, as responses spell it."""

    type: Literal["function"]


class NamedFunction(Body):
    """The name of a function."""

    name: Name


class NamedTool(Body):
    """A choice of one function, as chat completions nest it."""

    type: Literal["function"]
    function: NamedFunction


class FlatNamedTool(NamedFunction):
    """A choice of one function, as responses spell it."""

    type: Literal["function"]


Choice = Literal["none", "auto", "required"]


class CalledFunction(BaseModel):
    """A function that an earlier answer called. arguments: JSON."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """A message of the conversation. Further fields go to the chat template, nulls do not."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[Object] | None = None
    name: str | None = None
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: str | None = None


Messages = Filled[Message]
MOST_TOOLS = 128


class ChatRequest(Choices):
    """The body of /v1/chat/completions."""

    messages: Messages
    stream_options: ChatStreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MOST_TOOLS)] | None = None
    tool_choice: Choice | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[TextFormat | ObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = None
    chat_template_kwargs: Object | None = None
    modalities: Items[Literal["text"]] | None = None
    prediction: Object | None = Field(None, description="a hint, taken and not used")
    store: Literal[False] | None = None


class CompletionRequest(Choices):
    """The body of /v1/completions."""

    prompt: (
        str
        | Annotated[Filled[str], Field(max_length=128)]
        | Filled[TokenId]
        | Annotated[Filled[Filled[TokenId]], Field(max_length=128)]
    )
    max_tokens: Count | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class TextConfig(Body):
    """The form of a response's text."""

    format: Annotated[TextFormat | ObjectFormat | FlatSchemaFormat, Field(discriminator="type")] | None = None


class InputMessage(BaseModel):
    """A message among a response's inputs, given by a user or by an earlier response."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[Object]


class InputCall(BaseModel):
    """A call in an earlier response."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputResult(BaseModel):
    """The result of a call."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    type: Literal["function_call_output"]
    call_id: str
    output: str | Items[Object]


def _kind(item: Any) -> str | None:
    """Return the type of an input; a message may leave it out."""
    return item.get("type") or "message" if isinstance(item, dict) else getattr(item, "type", None)


Input = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")],
    Discriminator(_kind),
]


class ResponseRequest(Sampling):
    """The body of /v1/responses. The server keeps no response."""

    input: str | Filled[Input]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    tools: Annotated[list[FlatTool], Field(fail_fast=True, max_length=MOST_TOOLS)] | None = None
    tool_choice: Choice | FlatNamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: Items[str] | None = None
    chat_template_kwargs: Object | None = None
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    truncation: Literal["disabled"] | None = None
    reasoning: None = None


class TokenizeRequest(Body):
    """The body of /tokenize: a prompt or messages, as vLLM takes them."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Items[Tool] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = True
    return_token_strs: bool | None = None
    chat_template_kwargs: Object | None = None


class DetokenizeRequest(Body):
    """The body of /detokenize."""

    model: str | None = None
    tokens: Items[TokenId]
