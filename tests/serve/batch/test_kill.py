"""A whole server killed while batches run: after the last start every line is in the output exactly once."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
from openai.types import Batch

from tests.conftest import ROOT
from tests.serve.batch.test_http import begin, jsonl, wait_for
from tests.serve.conftest import wait_until


@contextlib.contextmanager
def killed(folder: Path, seconds: float) -> Iterator[openai.OpenAI]:
    """A server that is killed at the end, without warning."""
    command = [sys.executable, "-m", "tests.serve.batch.server_process", str(folder), str(seconds)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        try:
            yield openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        finally:
            process.kill()


def answered(client: openai.OpenAI, batches: list[Batch]) -> int:
    found = [client.batches.retrieve(batch.id).request_counts for batch in batches]
    return sum(counts.completed for counts in found if counts is not None)


def test_a_server_killed_twice(tmp_path: Path) -> None:
    with killed(tmp_path, 0.01) as client:
        batches = [begin(client, jsonl(60)) for _ in range(2)]
        wait_until(lambda: answered(client, batches) >= 15)
    with killed(tmp_path, 0.01) as client:
        states = [client.batches.retrieve(batch.id).status for batch in batches]
        assert "in_progress" in states, "the kill came while they ran"
        wait_until(lambda: answered(client, batches) >= 40)
    with killed(tmp_path, 0.0) as client:
        for batch in batches:
            done = wait_for(client, batch)
            assert (done.status, done.error_file_id) == ("completed", None)
            assert done.output_file_id is not None
            records = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
            assert [record["custom_id"] for record in records] == [f"c{n}" for n in range(60)]
