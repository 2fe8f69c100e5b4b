"""Why requests of a kind are decoded the way they are: the plan in force, the governor's mind, what was realised."""

from __future__ import annotations

from coordinator.speculation import STATES, Speculator
from sequoia.errors import InvalidArgument
from sequoia.rules import ParameterError, Rule, choose_rule
from sequoia.sampling import Sampling
from sequoia.situation import Situation
from sequoia.v1 import coordinator_pb2
from sequoia.wire import rule_name, shape_to_wire


def explain(
    message: coordinator_pb2.ExplainRequest, speculator: Speculator, default_rule: Rule
) -> coordinator_pb2.ExplainResponse:
    """Raises InvalidArgument naming the field that describes no request."""
    situation = _situation(message, speculator.round_trip_seconds, default_rule)
    found, governor = speculator.plans.find(situation), speculator.governor(situation)
    response = coordinator_pb2.ExplainResponse(
        plan_json=found.plan.to_json() if found else "",
        situation=str(situation),
        planned_situation=str(found.situation) if found else "",
        state=STATES[governor.gait],
        state_reason=governor.reason,
        num_ahead_hits=speculator.num_ahead_hits,
        num_ahead_misses=speculator.num_ahead_misses,
    )
    for shape, pace in governor.paces.items():
        figures = {"num_steps": pace.num_steps, "num_tokens": pace.num_tokens, "seconds": pace.seconds}
        response.realised.add(**figures, **shape_to_wire(shape))
    return response


def _situation(message: coordinator_pb2.ExplainRequest, round_trip_seconds: float, default_rule: Rule) -> Situation:
    try:
        temperature = Sampling(temperature=message.temperature).temperature
        rule = choose_rule(rule_name(message.rule), greedy=temperature == 0.0, seeded=False, default=default_rule)
    except ParameterError as error:
        raise InvalidArgument(error.message, error.field) from error
    num_sessions = message.num_sessions if message.HasField("num_sessions") else 1
    return Situation.of(rule, temperature, num_sessions, message.num_context_tokens, round_trip_seconds)
