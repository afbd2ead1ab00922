"""A whole server with a scripted engine, as a process that tests can kill: `python -m … FOLDER SECONDS` prints its address.

SECONDS is how long a step of the engine takes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from qwenkit.serve.config import ServeConfig
from qwenkit.serve.driver import Driver
from qwenkit.serve.metrics import Metrics
from qwenkit.serve.server import Server
from qwenkit.text.answer import AnswerFormat
from qwenkit.text.chat import JinjaChat
from qwenkit.text.tokenizer import Tokenizer
from tests.serve.conftest import MODEL, running
from tests.serve.scripted import ScriptedEngine
from tests.tiny_models import CHAT_TEMPLATE, write_tokenizer


def main(folder: Path, seconds: float) -> None:
    (folder / "tokenizer").mkdir(exist_ok=True)
    write_tokenizer(folder / "tokenizer")
    tokenizer = Tokenizer.from_folder(folder / "tokenizer")
    chat_format = JinjaChat(tokenizer, CHAT_TEMPLATE)
    engine = ScriptedEngine(tokenizer, ["Hello!"], max_num_seqs=4, seconds=seconds)
    metrics = Metrics("qwenkit", MODEL)
    server = Server(
        config=ServeConfig(port=0, state_dir=str(folder / "state"), batch_concurrency=4),
        tokenizer=tokenizer,
        chat_format=chat_format,
        driver=Driver(engine, metrics=metrics),  # type: ignore[arg-type]
        model_names=(MODEL,),
        max_model_len=engine.max_model_len,
        metrics=metrics,
        answer_format=AnswerFormat.of(tokenizer, chat_format),
    )
    with running(server) as live:
        print(live.url, flush=True)
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
