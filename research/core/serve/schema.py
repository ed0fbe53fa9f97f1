"""The fields of requests. A field that is not here is refused with the nearest name; none is read and ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from research.core.config.names import did_you_mean, nearest

StopText = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, le=2**31)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,8})$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1000),
]
Texts = Annotated[list[str], Field(min_length=1)]
Ids = Annotated[list[TokenId], Field(min_length=1)]


class Fields(BaseModel):
    """Base of all: JSON's own types only, no NaN, no field that nobody knows. An unknown field that is null is none."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name, value in data.items():
            if name not in known and value is not None:
                field = str(name)[:100]
                hint = did_you_mean(field, known) if len(known) < 40 or nearest(field, known) else ""
                raise PydanticCustomError(
                    "unknown_field", "there is no such field; {hint}", {"field": field, "hint": hint}
                )
        return {name: value for name, value in data.items() if name in known}


class Body(Fields):
    """A whole request."""

    @model_validator(mode="before")
    @classmethod
    def _plain_text(cls, data: Any) -> Any:
        where = _not_unicode(data)
        if where is not None:
            raise PydanticCustomError("half_character", "holds half a character (a lone surrogate)", {"field": where})
        return data


def _not_unicode(data: Any) -> str | None:
    """Where a text is that UTF-8 cannot carry; None when there is none."""
    stack: list[tuple[str, Any]] = [("", data)]
    while stack:
        where, value = stack.pop()
        if isinstance(value, str):
            if not value.isascii() and _broken(value):
                return where or "the body"
        elif isinstance(value, dict):
            for key, item in value.items():
                if not key.isascii() and _broken(key):
                    return f"a name in {where or 'the body'}"
                stack.append((f"{where}.{key}" if where else key, item))
        elif isinstance(value, list):
            stack += [(f"{where}[{index}]", item) for index, item in enumerate(value)]
    return None


def _broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


# --- what both of OpenAI's endpoints know -------------------------------------------------------------------------


class StreamOptions(Fields):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: the usage so far in every chunk


class JsonSchema(Fields):
    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # an answer follows its schema either way


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_needed(self):
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema belongs to type=json_schema, and is needed there")
        return self


class Sampled(Body):
    """How an answer is chosen and where it ends. None: the model's own default."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=2**31)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Annotated[str, Field(min_length=1, max_length=10_000)] | None = None
    guided_choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1000)] | None = (
        None
    )
    priority: Annotated[int, Field(ge=0, le=1000)] = 0
    user: Annotated[str, Field(max_length=500)] | None = None  # goes into the log
    store: Literal[False] | None = None  # nothing is stored
    service_tier: Literal["auto", "default"] | None = None  # there is one

    @model_validator(mode="after")
    def _options_of_streams(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream=true")
        if self.temperature is not None and 0 < self.temperature < 1e-3:
            raise ValueError("temperature is 0 (greedy), or at least 0.001")
        return self


class ContentPart(Fields):
    type: Literal["text"]
    text: str


class CalledFunction(Fields):
    name: Annotated[str, Field(min_length=1, max_length=200)]
    arguments: str


class ToolCall(Fields):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None


class Function(Fields):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    type: Literal["function"]
    function: Function


class NamedFunction(Fields):
    name: str


class ToolChoice(Fields):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampled):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=1000)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = True


class CompletionRequest(Sampled):
    prompt: str | Texts | Ids | Annotated[list[Ids], Field(min_length=1)]
    suffix: str | None = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1)] | None = None


class EmbeddingRequest(Body):
    model: str | None = None
    input: str | Texts | Ids | Annotated[list[Ids], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    normalize: bool = True
    priority: Annotated[int, Field(ge=0, le=1000)] = 0
    user: Annotated[str, Field(max_length=500)] | None = None


# --- adapters -----------------------------------------------------------------------------------------------------


class LoadAdapter(Body):
    lora_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,200}$")]
    lora_path: Annotated[str, Field(min_length=1, max_length=4000)]


class UnloadAdapter(Body):
    lora_name: str


# --- TGI ----------------------------------------------------------------------------------------------------------


class Grammar(Fields):
    type: Literal["json", "regex"]
    value: dict[str, Any] | str


class TgiParameters(Fields):
    """As text-generation-inference names them; ``top_p`` and the like of null mean none."""

    adapter_id: str | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    decoder_input_details: bool = False
    details: bool = False
    do_sample: bool = False
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    grammar: Grammar | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    return_full_text: bool | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[list[StopText], Field(max_length=16)] = []
    temperature: Annotated[float, Field(ge=0.001, le=100)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**31)] | None = None
    top_n_tokens: Annotated[int, Field(ge=0, le=20)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    truncate: Annotated[int, Field(ge=1, le=2**31)] | None = None


class TgiRequest(Body):
    inputs: Annotated[str, Field(min_length=1)]
    parameters: TgiParameters = TgiParameters()
