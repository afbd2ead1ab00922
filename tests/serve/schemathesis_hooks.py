"""Loaded by schemathesis: random bodies have few of the optional fields; with all of them nearly every one contradicts itself."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import strategies as st

KEPT = ("messages", "prompt", "input", "max_tokens", "tokens")  # what a request cannot do without
ANSWERED = "tiny"


@schemathesis.hook
def flatmap_body(context: Any, body: Any) -> Any:
    if not isinstance(body, dict) or not any(name in body for name in KEPT):
        return st.just(body)
    names = sorted(set(body) - set(KEPT) - {"model"})
    some = st.sets(st.sampled_from(names), max_size=3) if names else st.just(set())
    return st.tuples(some, st.booleans()).map(lambda drawn: _fewer(body, *drawn))


def _fewer(body: dict[str, Any], names: set[str], model_is_served: bool) -> dict[str, Any]:
    fewer = {name: value for name, value in body.items() if name in KEPT or name in names}
    if "model" in body:
        fewer["model"] = ANSWERED if model_is_served else body["model"]
    return fewer
