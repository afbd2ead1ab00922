"""Cases of tests/data/cases: what is in one, how its requests are sent, and when its outcome is right.

A case has steps (requests) and checks. A check names a place in the outcome of a step (the last one, unless it says which) or in
what was looked at in the model's files, and what must stand there. `checks` is a list of checks that must all hold, or a list of
such lists of which one must. "$0.json.a.b" in a body stands for that part of the outcome of step 0.
"""

from __future__ import annotations

import itertools
import json
import lzma
import re
import time
from dataclasses import dataclass
from typing import Any

import httpx

from tests.conftest import DATA
from tests.serve.conftest import HTTP, LiveServer

Outcome = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """`how`: scripted (a scripted engine answers), smollm2, folder or gguf (a tiny model of `files`), hub, qwen1 (messages)."""

    name: str
    how: str
    fields: dict[str, Any]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return list(self.fields.get("steps", ()))

    def why_wrong(self, done: list[Outcome], look: Outcome) -> str:
        """Empty if the case holds, else the checks that fail, of each way to be right."""
        ways = self.fields["checks"]
        ways = [ways] if ways and isinstance(ways[0], dict) else ways
        failing = [[check for check in way if not _holds(check, done, look)] for way in ways]
        return "" if [] in failing else f"{failing} in {json.dumps(done)[:2000]} {json.dumps(look)[:1000]}"


def read_cases() -> list[Case]:
    """All cases, those that once failed and their neighbours that never did."""
    cases = []
    for path in sorted((DATA / "cases").glob("*.jsonl.xz")):
        for line in lzma.decompress(path.read_bytes()).decode().splitlines():
            fields = json.loads(line)
            group = f"{path.name.partition('.')[0]}{'-guard' if fields['guard'] else ''}"
            cases.append(Case(f"{group}: {fields['name']}", fields["how"], fields))
    return cases


def send(live: LiveServer, step: dict[str, Any], done: list[Outcome]) -> Outcome:
    """Send the request of a step. The outcome has status, json or events, the error's sentence, and what a stream adds up to."""
    body = filled(step.get("body"), done)
    content = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"} if body is not None else {}
    stamps = [time.monotonic()]
    text = ""
    with httpx.stream(
        step.get("method", "POST"),
        live.url + step["path"],
        content=content,
        headers=headers | step.get("headers", {}),
        **HTTP,
    ) as response:
        for piece in response.iter_text():
            stamps.append(time.monotonic())
            text += piece
    outcome: Outcome = {"status": response.status_code}
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        events = [json.loads(line[6:]) for line in text.split("\n") if re.match(r"data: \{", line)]
        outcome |= {"events": events, "joined": joined(events)}
        outcome["longest_silence"] = max(after - before for before, after in itertools.pairwise(stamps))
    else:
        outcome["json"] = json.loads(text)
        error = at(outcome["json"], "error")
        outcome["error"] = error.get("message") if isinstance(error, dict) else None
    return outcome


def joined(events: list[dict[str, Any]]) -> Outcome:
    """What the chunks of a chat add up to, and what stands beside a finish_reason."""
    added: dict[str, str] = {}
    reasons: list[str] = []
    beside_the_end, twice = "", 0
    for choice in (choice for event in events for choice in event.get("choices") or ()):
        delta = choice.get("delta") or {}
        for name, value in delta.items():
            if isinstance(value, str) and name != "role":
                added[name] = added.get(name, "") + value
        twice += bool(delta.get("reasoning") and delta.get("reasoning_content"))
        if choice.get("finish_reason"):
            reasons.append(choice["finish_reason"])
            beside_the_end += (delta.get("content") or "") + (
                json.dumps(delta["tool_calls"]) if delta.get("tool_calls") else ""
            )
    return {
        "added": added,
        "finish_reasons": reasons,
        "text_in_finishing_chunk": beside_the_end,
        "deltas_with_both_keys": twice,
    }


def at(value: Any, path: str) -> Any:
    """The part of a JSON value under a dotted path; None if it is not there."""
    for key in filter(None, path.split(".")):
        if isinstance(value, list):
            value = value[int(key)] if -len(value) <= int(key) < len(value) else None
        else:
            value = value.get(key) if isinstance(value, dict) else None
    return value


def filled(value: Any, done: list[Outcome]) -> Any:
    """A body with the parts of earlier outcomes that it names."""
    if isinstance(value, str) and (found := re.match(r"\$(\d+)\.", value)):
        return at(done[int(found[1])], value[found.end() :])
    if isinstance(value, dict):
        return {name: filled(item, done) for name, item in value.items()}
    if isinstance(value, list):
        items: list[Any] = []
        for item in value:
            if isinstance(item, dict) and item.keys() == {"$splice"}:
                items += filled("$" + item["$splice"], done) or []
            else:
                items.append(filled(item, done))
        return items
    return value


def _holds(check: dict[str, Any], done: list[Outcome], look: Outcome) -> bool:
    found = (
        at(look, check["look"])
        if "look" in check
        else at(done[check.get("step", -1)], check.get("at", ""))
        if done
        else None
    )
    wanted = check.get("value")
    text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    match check["op"]:
        case "equals":
            return bool(found == wanted)
        case "json_equals":
            return isinstance(found, str) and bool(json.loads(found) == wanted)
        case "contains":
            return found is not None and wanted in text
        case "not_contains":
            return found is not None and wanted not in text
        case "present":
            return bool(found)
        case "absent":
            return not found
        case "among":
            return found in wanted  # type: ignore[operator]
        case "superset":
            return found is not None and set(wanted) <= set(found)  # type: ignore[arg-type]
        case "at_most":
            return found is not None and bool(found <= wanted)
        case "close":
            return found is not None and abs(found - wanted) < 1e-6
        case "ends_with":
            return text.endswith(wanted)  # type: ignore[arg-type]
        case "same_as_step":
            return found is not None and found == at(done[wanted], check["at"])  # type: ignore[index]
        case "same_as_look":
            return found is not None and found == at(look, str(wanted))
    raise AssertionError(f"unknown check {check['op']}")
