"""A conversation by Qwen-Agent with two tools, run by test_qwen_agent.py in an interpreter that has it.

Arguments: the server's URL, and who writes tool calls into the prompt: `server` (the API's tools) or `agent` (its own text).
Prints the messages of the answer as JSON.
"""

import json
import sys

from qwen_agent.agents import Assistant
from qwen_agent.tools.base import BaseTool, register_tool


@register_tool("get_weather")
class Weather(BaseTool):
    description = "The weather of a city"
    parameters = {  # noqa: RUF012
        "type": "object",
        "properties": {"city": {"type": "string", "description": "its name"}},
        "required": ["city"],
    }

    def call(self, params: str, **settings: object) -> str:
        return f"rain in {json.loads(params)['city']}"


@register_tool("clock")
class Clock(BaseTool):
    description = "The time in a zone"
    parameters = {  # noqa: RUF012
        "type": "object",
        "properties": {"zone": {"type": "string", "description": "such as CET"}},
        "required": ["zone"],
    }

    def call(self, params: str, **settings: object) -> str:
        return f"noon in {json.loads(params)['zone']}"


def main(url: str, writer: str) -> None:
    model = {
        "model": "tiny",
        "model_type": "oai",
        "model_server": url + "/v1",
        "api_key": "none",
        "generate_cfg": {"use_raw_api": writer == "server", "top_p": 0.8, "top_k": 20, "max_retries": 0},
    }
    agent = Assistant(llm=model, function_list=["get_weather", "clock"])
    *_, answer = agent.run([{"role": "user", "content": "Weather and time in Köln?"}])
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
