"""The options of a request by the fields of its body. Types are checked here, values by the coordinator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coordinator.gateway.body import Body
from sequoia.errors import InvalidArgument
from sequoia.options import RequestOptions, Speculation
from sequoia.sampling import MAX_LOGIT_BIASES
from sequoia.topology import DynamicShape, Topology, TreeShape

# More than any worker serves; what is larger is not worth the time to look at it.
_MOST_NODES = 4096


def read_options(body: Body) -> RequestOptions:
    """All but max_tokens and logprobs, of which each endpoint has its own idea."""
    return RequestOptions(
        temperature=body.number("temperature"),
        top_p=body.number("top_p"),
        top_k=body.whole("top_k"),
        min_p=body.number("min_p"),
        repetition_penalty=body.number("repetition_penalty"),
        presence_penalty=body.number("presence_penalty"),
        frequency_penalty=body.number("frequency_penalty"),
        logit_bias=_biases(body.group("logit_bias")),
        seed=_seed(body),
        stop=_stops(body),
        stop_token_ids=body.items("stop_token_ids") or (),
        ignore_eos=body.flag("ignore_eos"),
        min_tokens=body.whole("min_tokens"),
        json_schema=_json_schema(body.group("response_format")),
        speculation=_speculation(body),
        rule=body.text("rule"),
    )


def _seed(body: Body) -> int | None:
    seed, last = body.whole("seed"), (body.whole("n") or 1) - 1
    if seed is not None and seed + last >= 2**64:
        raise InvalidArgument(f"choice {last} would have {seed + last}; seeds end before 2**64", "seed")
    return seed


def _stops(body: Body) -> list[str]:
    if isinstance(body.fields.get("stop"), list):
        stops = Body({f"stop[{index}]": each for index, each in enumerate(body.fields["stop"])})
        return [stops.text(name) or "" for name in stops.fields]
    stop = body.text("stop")
    return [] if stop is None else [stop]


def _biases(biases: Body | None) -> dict[int, float]:
    if biases is None:
        return {}
    if len(biases.fields) > MAX_LOGIT_BIASES:
        raise InvalidArgument(f"names {len(biases.fields)} tokens; at most {MAX_LOGIT_BIASES}", "logit_bias")
    try:
        return {int(name): biases.number(name) or 0.0 for name in biases.fields}
    except ValueError as error:
        raise InvalidArgument(f"keys are token ids: {error}", "logit_bias") from error


def _json_schema(form: Body | None) -> Mapping[str, Any] | None:
    if form is None:
        return None
    kind = form.text("type")
    if kind == "json_schema":
        _check_names(form, "type", "json_schema")
        named = form.group("json_schema") or Body({}, form.name_of("json_schema"))
        # It is held to whether `strict` or not; its name changes nothing.
        _check_names(named, "name", "schema", "strict")
        named.text("name")
        named.flag("strict")
        if (schema := named.group("schema")) is None:
            raise InvalidArgument("is missing; give the JSON schema of the answer", named.name_of("schema"))
        return schema.fields
    _check_names(form, "type")
    if kind not in ("text", "json_object"):
        raise InvalidArgument("is none of text, json_object and json_schema", form.name_of("type"))
    return {"type": "object"} if kind == "json_object" else None


def _check_names(group: Body, *known: str) -> None:
    for name, value in group.fields.items():
        if name not in known and value is not None:
            raise InvalidArgument("is not served; leave it out", group.name_of(name))


def _speculation(body: Body) -> Speculation:
    if not isinstance(body.fields.get("speculation"), dict):
        mode: Any = body.text("speculation")
        return mode or "auto"
    shape = Body(body.fields["speculation"], "speculation")
    try:
        return _shape(shape)
    except ValueError as error:
        raise InvalidArgument(f"is no tree: {error}", "speculation") from error


def _shape(shape: Body) -> TreeShape:
    if shape.fields.keys() == {"parents"}:
        parents = shape.items("parents") or []
        if len(parents) > _MOST_NODES:
            raise ValueError(f"it has {len(parents)} nodes")
        named = Body({f"parents[{index}]": each for index, each in enumerate(parents)}, "speculation")
        return Topology(tuple(-2 if (parent := named.whole(name)) is None else parent for name in named.fields))
    if shape.fields.keys() == {"size", "levels", "width"}:
        return DynamicShape(*(shape.whole(name) or 0 for name in ("size", "levels", "width")))
    raise ValueError("give parents, or size, levels and width")
