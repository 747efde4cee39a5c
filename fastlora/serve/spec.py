"""What a request says: its fields, and the adapters that its `model` names."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST_TERMS, MOST_WEIGHT = 16, 100.0
# JSON can hold half of a surrogate pair, which is no text: encoding it raises a ValueError
Text = Annotated[str, AfterValidator(lambda text: text.encode().decode())]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]
Name = Annotated[Text, Field(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Refused(Exception):
    """What a client is told: an HTTP status, OpenAI's type of error, a sentence, and the field that is meant."""

    def __init__(self, status, message, kind="BadRequestError", param=None):
        super().__init__(message)
        self.status, self.message, self.kind, self.param = status, message, kind, param


def adapters_of(model, base, names):
    """None, a name or {name: weight} for the `model` of a request: a name, the base's, `base:adapter`, `a*0.6+b*0.4`.

    An adapter's exact name wins. Raises Refused: 404 for a name that is not there, 400 for a weight that is no number
    of at most MOST_WEIGHT, or more than MOST_TERMS adapters.
    """
    if model in names:
        return model
    if model == base:
        return None
    text = model.removeprefix(f"{base}:")
    if text in names:
        return text
    if "*" not in text and "+" not in text:
        raise unknown(model)
    weights = {}
    for term in text.split("+"):
        name, star, weight = (part.strip() for part in term.partition("*"))
        if name not in names:
            raise unknown(name)
        weights[name] = weights.get(name, 0.0) + (_weight(weight, name) if star else 1.0)
    if len(weights) > MOST_TERMS:
        raise Refused(400, f"model: {len(weights)} adapters, expected at most {MOST_TERMS}", param="model")
    return weights


def _weight(text, name):
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not abs(weight) <= MOST_WEIGHT:
        raise Refused(400, f"model: the weight {text!r} of {name!r} is no number of at most {MOST_WEIGHT}", param="model")
    return weight


def unknown(name):
    """The 404 for a name that is not there."""
    return Refused(404, f"The model {name!r} does not exist.", "NotFoundError", "model")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Sampling(Strict):
    """The fields that completions and chat share. What would change an answer and is not supported has one value."""

    model: Name
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    ignore_eos: bool = False
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    n: Literal[1] | None = 1
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0.0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0.0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # these change no answer
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    def stops(self):
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def wants_usage(self):
        return not self.stream or bool((self.stream_options or {}).get("include_usage"))


class Completion(Sampling):
    prompt: Text | Annotated[list[TokenId], Field(min_length=1)] | Annotated[list[Text], Field(min_length=1, max_length=1)]
    best_of: Literal[1] | None = 1
    echo: Literal[False] | None = False
    logprobs: None = None
    suffix: None = None


class Part(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Name
    content: Text | list[Part]
    name: str | None = None

    def text(self):
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Chat(Sampling):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: Literal[False] | None = False
    top_logprobs: None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


class Load(Strict):
    lora_name: Name
    lora_path: Name
    load_inplace: bool = False


class Unload(Strict):
    lora_name: Name
    lora_int_id: int | None = None
