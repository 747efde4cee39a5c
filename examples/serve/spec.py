"""What a request says: its fields, and the adapters that its `model` names."""

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST_TERMS, MOST_WEIGHT = 16, 100.0


class Refused(Exception):
    """What a client is told: an HTTP status, a sentence, OpenAI's type of error, and the field that is meant."""

    def __init__(self, status, message, kind="BadRequestError", param=None):
        super().__init__(message)
        self.told = status, message, kind, param


def unknown(name):
    """The 404 for a name that is not there."""
    return Refused(404, f"The model {name!r} does not exist.", "NotFoundError", "model")


def adapters_of(model, base, names):
    """None, a name or {name: weight} for the `model` of a request: a name, the base's, `base:adapter`, `a*0.6+b*0.4`.

    An adapter's exact name wins. Raises Refused: 404 for a name that is not there, 400 for a weight that is no number
    of at most MOST_WEIGHT and for more than MOST_TERMS adapters.
    """
    text = model if model in names else model.removeprefix(f"{base}:")
    if text in names or model == base:
        return text if text in names else None
    if "*" not in text and "+" not in text:
        raise unknown(model)
    weights = {}
    for term in text.split("+"):
        name, star, weight = (part.strip() for part in term.partition("*"))
        if name not in names:
            raise unknown(name)
        try:
            value = float(weight) if star else 1.0
        except ValueError:
            value = math.nan
        if not abs(value) <= MOST_WEIGHT or len(weights) == MOST_TERMS:
            told = f"model: got {weight!r} for {name!r}, expected a number up to {MOST_WEIGHT}"
            raise Refused(400, f"{told}, for at most {MOST_TERMS} adapters", param="model")
        weights[name] = weights.get(name, 0.0) + value
    return weights


# JSON can hold half of a surrogate pair, which is no text: encoding it raises a ValueError
Text = Annotated[str, AfterValidator(lambda text: text.encode().decode())]
Name = Annotated[Text, Field(min_length=1, max_length=1024)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Several = Annotated[list[TypeVar("T")], Field(min_length=1)]
Tokens = Several[Annotated[int, Field(ge=0, lt=2**31)]]
Alone = AfterValidator(lambda one: [one])
Penalty = Annotated[float, Field(ge=-2, le=2)] | None
Logprobs = Annotated[int, Field(ge=0, le=20)] | None
Bias = dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]
Bias = Annotated[Bias, Field(max_length=1024), AfterValidator(lambda bias: {int(t): x for t, x in bias.items()})]
DRAWS = ("ignore_eos", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
         "repetition_penalty", "logit_bias")  # fmt: skip


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Sampling(Strict):
    """The fields that completions and chat share. What would change an answer and is not supported has one value."""

    model: Name
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[Stop, Alone] | Annotated[list[Stop], Field(max_length=4)] | None = None
    ignore_eos: bool = False
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    frequency_penalty: Penalty = None
    presence_penalty: Penalty = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    logit_bias: Bias | None = None
    # these change no answer
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    def sampling(self, choice):
        """What `Engine.submit` takes; each choice of a prompt has the next seed."""
        given = {name: value for name in DRAWS if (value := getattr(self, name)) is not None}
        return {**given, "logprobs": self.tops, "seed": None if self.seed is None else self.seed + choice}


class Completion(Sampling):
    prompt: Annotated[Text, Alone] | Annotated[Tokens, Alone] | Several[Text] | Several[Tokens]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: Logprobs = None
    suffix: None = None
    tops = property(lambda self: self.logprobs)


class Part(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Name
    content: Text | Annotated[list[Part], AfterValidator(lambda parts: "".join(part.text for part in parts))]
    name: str | None = None


class Chat(Sampling):
    messages: Several[Message]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tops = property(lambda self: self.top_logprobs or 0 if self.logprobs else None)


class Load(Strict):
    lora_name: Name
    lora_path: Name
    load_inplace: bool = False


class Unload(Strict):
    lora_name: Name
    lora_int_id: int | None = None
