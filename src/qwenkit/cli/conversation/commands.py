"""The slash commands of a conversation: their names, their help in English and Chinese, and what each does.

In: a conversation and the line that was typed. Out: what to show, what to ask the model again, or that it is time to leave.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenkit.cli.conversation.state import SETTINGS, Conversation, Piece, setting
from qwenkit.settings import nearest

DEFAULT = "default"  # `/set temperature default`, `/system default`: take a setting back


@dataclass(frozen=True)
class Outcome:
    """What follows from a command: text to show, an answer to show while it is written, or the end."""

    show: str = ""
    answer: Generator[Piece, None, None] | None = None
    leave: bool = False


def run_command(conversation: Conversation, line: str) -> Outcome:
    """Do what a line beginning with a slash says. ValueError or OSError, and nothing changed, if it cannot be done."""
    name, _, rest = line[1:].partition(" ")
    name, newline, more = name.partition("\n")
    rest = (more + newline + rest if newline else rest).strip()
    command = COMMANDS.get(name)
    if command is None:
        hint = nearest(name, COMMANDS).replace("did you mean ", "did you mean /")
        raise ValueError(f"/{name} is no command; {hint} (a message that begins with a slash is written //{name})")
    if rest and not command.argument:
        raise ValueError(f"/{name} stands alone, given was {rest!r}")
    return command.run(conversation, rest)


def _system(conversation: Conversation, text: str) -> Outcome:
    if text:
        conversation.system = None if text == DEFAULT else text
    return Outcome(
        f"system: {conversation.system if conversation.system is not None else '(the default of the model)'}"
    )


def _clear(conversation: Conversation, _: str) -> Outcome:
    conversation.clear()
    return Outcome("all messages forgotten; system text and settings stay")


def _history(conversation: Conversation, _: str) -> Outcome:
    lines = [] if conversation.system is None else [f"system: {conversation.system}"]
    for message in conversation.messages:
        lines.append(f"{message.role}{' (stopped)' if message.partial else ''}: {message.content}")
    return Outcome("\n".join(lines) or "no messages yet")


def _show(conversation: Conversation, _: str) -> Outcome:
    shown = [name for name in SETTINGS if name in _SHOWN or name in conversation.settings]
    head = [f"{'model':<20} {conversation.talker.name}", _system(conversation, "").show]
    return Outcome("\n".join([*head, *(_tell(name, conversation) for name in shown)]))


_SHOWN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens")  # what most decides an answer


def _undo(conversation: Conversation, _: str) -> Outcome:
    taken = conversation.undo()
    if taken is None:
        raise ValueError("there is nothing to undo")
    return Outcome(f"taken back: {taken}")


def _retry(conversation: Conversation, _: str) -> Outcome:
    if not conversation.messages:
        raise ValueError("there is nothing to retry")
    return Outcome(answer=conversation.retry())


def _seed(conversation: Conversation, text: str) -> Outcome:
    return _set(conversation, f"seed {text}" if text else "")


def _set(conversation: Conversation, text: str) -> Outcome:
    changes = parse_settings(text)
    if changes:
        conversation.change(changes)
        return Outcome("\n".join(_tell(name, conversation) for name in changes))
    return Outcome("\n".join(_tell(name, conversation) for name in SETTINGS))


def _tell(name: str, conversation: Conversation) -> str:
    if name in conversation.settings:
        return f"{name:<20} {_as_text(conversation.settings[name])}"
    value = conversation.talker.defaults().get(name)
    return f"{name:<20} {'' if value is None else _as_text(value) + ' '}(default)"


def _as_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{token}={bias}" for token, bias in value.items()) or "none"
    if isinstance(value, tuple):
        return " ".join(repr(item) for item in value) or "none"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def parse_settings(text: str) -> dict[str, Any]:
    """`name value name=value …` as values for `Conversation.change`. Quotes hold a value with spaces together.

    A name given several times gathers the values where the field holds several; `default` is None. ValueError otherwise.
    """
    try:
        words = shlex.split(text)
    except ValueError:
        raise ValueError(f"a quote is open in {text!r}") from None
    items: dict[str, list[Any]] = {}
    while words:
        name, equals, value = words.pop(0).partition("=")
        flag = setting(name)
        if not equals:
            if not words:
                raise ValueError(f"{flag.name} needs a value: /set {flag.name} VALUE, or default")
            value = words.pop(0)
        items.setdefault(flag.name, []).append(None if value == DEFAULT else flag.parse(value))
    changes: dict[str, Any] = {}
    for name, values in items.items():
        if SETTINGS[name].shape == "one" or values == [None]:
            changes[name] = values[-1]
        elif None in values:
            raise ValueError(f"{name} is given values and default at once")
        else:
            changes[name] = SETTINGS[name].gather(values)
    return changes


def _path(text: str, command: str) -> Path:
    if not text:
        raise ValueError(f"{command} needs a file: {command} FILE")
    return Path(text).expanduser()


def _save(conversation: Conversation, text: str) -> Outcome:
    path = _path(text, "/save")
    conversation.save(path)
    return Outcome(f"saved to {path}")


def _load(conversation: Conversation, text: str) -> Outcome:
    path = _path(text, "/load")
    conversation.load(path)
    return Outcome(f"{len(conversation.messages) // 2} exchanges loaded from {path}")


def _exit(conversation: Conversation, _: str) -> Outcome:
    return Outcome(leave=True)


def _help(conversation: Conversation, _: str) -> Outcome:
    return Outcome(help_text(speaks_chinese(os.environ)))


@dataclass(frozen=True)
class Command:
    """One slash command. `argument` is what stands after its name in /help; empty for a command that stands alone."""

    run: Callable[[Conversation, str], Outcome]
    argument: str
    english: str
    chinese: str


COMMANDS = {
    "help": Command(_help, "", "this text", "显示本帮助"),
    "system": Command(
        _system,
        "TEXT",
        "set the system text; alone: show it; `default`: the model's own",
        "设置系统提示；不带参数则显示；default 恢复模型自带的提示",
    ),
    "show": Command(_show, "", "show model, system text and settings", "显示模型、系统提示和设置"),
    "clear": Command(_clear, "", "forget all messages", "清除所有消息"),
    "history": Command(_history, "", "show all messages", "显示所有消息"),
    "undo": Command(_undo, "", "take back the last question and its answer", "撤回上一个问题及其回答"),
    "retry": Command(_retry, "", "answer the last question again", "重新回答上一个问题"),
    "seed": Command(
        _seed,
        "N",
        "make answers repeatable: the first one uses seed N, the next N+1, …; `default`: random",
        "使回答可复现：第一个回答用种子 N，下一个用 N+1……；default 恢复随机",
    ),
    "set": Command(
        _set,
        "NAME VALUE …",
        "change settings (NAME=VALUE works too); alone: list them; VALUE `default` takes one back",
        "修改设置（也可写作 NAME=VALUE）；不带参数则列出；值为 default 时恢复默认",
    ),
    "save": Command(_save, "FILE", "save messages and settings as JSON", "将消息和设置保存为 JSON 文件"),
    "load": Command(_load, "FILE", "go on with a saved conversation", "载入已保存的对话并继续"),
    "exit": Command(_exit, "", "leave (Ctrl-D does too)", "退出（也可按 Ctrl-D）"),
}

_KEYS = {
    False: """\
Enter sends; Esc then Enter (or Alt-Enter) begins a new line, and so does Enter after a backslash (\\) at the line's end.
Ctrl-C stops an answer; what came until then stays. //TEXT sends a message that begins with a slash.""",
    True: """\
回车发送；先按 Esc 再按回车（或 Alt-回车）换行，行尾的反斜杠（\\）加回车也会换行。
Ctrl-C 中止回答，已生成的部分会保留。以 // 开头的内容会作为以斜杠开头的消息发送。""",
}


def speaks_chinese(environ: Mapping[str, str]) -> bool:
    """Whether the locale asks for Chinese; of its variables the first that is set counts."""
    values = (environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return next((value for value in values if value), "").lower().startswith("zh")


def help_text(chinese: bool) -> str:
    """What /help shows."""
    usages = {name: f"/{name} {command.argument}".strip() for name, command in COMMANDS.items()}
    width = max(map(len, usages.values())) + 2
    lines = [
        f"{usages[name]:<{width}}{command.chinese if chinese else command.english}"
        for name, command in COMMANDS.items()
    ]
    return "\n".join([*lines, "", _KEYS[chinese]])
