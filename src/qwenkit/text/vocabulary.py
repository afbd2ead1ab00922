"""Reads byte-level BPE vocabularies: tokenizer.json, vocab.json + merges.txt, qwen.tiktoken, a GGUF's embedded lists.

In: files of a model folder, or lists. Out: a `Vocabulary`, the same for all four: the bytes of every ordinary token,
the added tokens, and an encoder that turns plain text into ids. Control tokens are taken out of what the encoder knows,
so nothing that goes through it can come out as one. Everything in the files is checked before use; what is wrong ends
in a ValueError that names the file.
"""

import base64
import binascii
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from qwenkit.files import LARGEST_TOKENIZER, read_file
from qwenkit.text.added_tokens import AddedToken
from qwenkit.text.encoder import MAX_WHOLE, ByteLevelEngine, Cuts, Encoder, TiktokenEngine, guarded
from qwenkit.text.trial import try_tokenizer

_T = TypeVar("_T")

MAX_TOKEN_ID = 1 << 24  # far above any vocabulary; keeps a corrupt id from asking for terabytes

# The pre-tokenizer of every Qwen from the first to the third generation (tokenization_qwen.py, tokenization_qwen2.py).
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

QWEN1_RANKS = 151_643
QWEN1_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))

# Token types of a GGUF file (tokenizer.ggml.token_type).
_GGUF_UNKNOWN, _GGUF_CONTROL, _GGUF_USER_DEFINED, _GGUF_UNUSED = 2, 3, 4, 5


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer is made of. ordinary: id -> bytes of the tokens that plain text can produce."""

    ordinary: Mapping[int, bytes]
    added: Sequence[AddedToken]
    encoder: Encoder
    prefix: tuple[int, ...] = ()
    """Ids that the files put before every text."""


@dataclass(frozen=True)
class Steps:
    """What happens to text around the merges, as objects of the `tokenizers` library."""

    normalizer: normalizers.Normalizer | None
    pre_tokenizer: pre_tokenizers.PreTokenizer
    ignore_merges: bool
    cuts: Cuts | None
    max_whole: int = MAX_WHOLE


@dataclass(frozen=True)
class Scheme:
    """How text is cut before merging. pattern None: GPT-2's own; digits: each digit apart; nfc: normalise first."""

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False

    def steps(self) -> Steps:
        cuts: list[pre_tokenizers.PreTokenizer] = []
        if self.digits:
            cuts.append(pre_tokenizers.Digits(individual_digits=True))
        if self.pattern is not None:
            cuts.append(pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"))
        cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None))
        normalizer = normalizers.NFC() if self.nfc else None
        return Steps(normalizer, pre_tokenizers.Sequence(cuts), self.ignore_merges, self.cuts())

    def cuts(self) -> Cuts:
        """Where text may be cut before these steps."""
        return Cuts(digits=self.digits or self.pattern == QWEN_PATTERN, lines=self.pattern is not None)


QWEN2_SCHEME = Scheme(QWEN_PATTERN, nfc=True)
# The values of tokenizer.ggml.pre that are understood. "default" is what early converters wrote for GPT-2's way.
GGUF_SCHEMES = {
    "qwen2": QWEN2_SCHEME,
    "gpt-2": Scheme(),
    "default": Scheme(),
    "smollm": Scheme(digits=True),
    "llama-bpe": Scheme(LLAMA3_PATTERN, ignore_merges=True),
}
# Other names that llama.cpp has for the same cutting.
GGUF_SCHEMES |= dict.fromkeys(("deepseek-r1-qwen", "kormo", "megrez", "f2llmv2"), GGUF_SCHEMES["qwen2"])
GGUF_SCHEMES |= dict.fromkeys(("llama3", "llama-v3"), GGUF_SCHEMES["llama-bpe"])


def read_folder(folder: Path) -> Vocabulary:
    """The vocabulary of a model folder; see `Tokenizer.from_folder`."""
    if (folder / "tokenizer.json").is_file():
        try:
            return _read_tokenizer_json(folder / "tokenizer.json")
        except RecursionError:
            raise ValueError(f"{folder / 'tokenizer.json'}: nested too deeply") from None
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _read_vocab_and_merges(folder)
    if (folder / "qwen.tiktoken").is_file():
        return _read_tiktoken(folder / "qwen.tiktoken")
    raise FileNotFoundError(
        f"{folder} holds no tokenizer: expected tokenizer.json, or vocab.json with merges.txt, or qwen.tiktoken"
    )


def from_gguf_lists(
    tokens: Sequence[str], merges: Sequence[str], token_types: Sequence[int] | None, pre: str
) -> Vocabulary:
    """The vocabulary embedded in a GGUF file; see `Tokenizer.from_bpe`."""
    scheme = GGUF_SCHEMES.get(pre)
    if scheme is None:
        raise ValueError(f"tokenizer.ggml.pre is {pre!r}, known are {', '.join(sorted(GGUF_SCHEMES))}")
    if token_types is None:
        token_types = [_GGUF_CONTROL if _looks_special(token) else 1 for token in tokens]
    if len(token_types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type has {len(token_types)} entries for {len(tokens)} tokens")
    kinds = list(zip(tokens, token_types, strict=True))
    added = [
        AddedToken(token, id, special=kind != _GGUF_USER_DEFINED)
        for id, (token, kind) in enumerate(kinds)
        if kind in (_GGUF_UNKNOWN, _GGUF_CONTROL, _GGUF_USER_DEFINED)
    ]
    vocab = {token: id for id, (token, kind) in enumerate(kinds) if kind != _GGUF_UNUSED}
    pairs = _merge_pairs(merges, "tokenizer.ggml.merges")
    return _byte_level(vocab, pairs, added, scheme.steps(), "tokenizer.ggml.tokens")


def _read_tokenizer_json(path: Path) -> Vocabulary:
    data = _read_json(path)
    model = data.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"{path}: no model in it")
    kind = model.get("type", "BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        raise ValueError(f"{path}: a {kind} tokenizer; only byte-level BPE is supported")
    if not _mentions_byte_level(data.get("pre_tokenizer")) or model.get("end_of_word_suffix"):
        raise ValueError(f"{path}: a BPE tokenizer over characters (sentencepiece); only byte-level BPE is supported")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError(f"{path}: model.vocab must be an object and model.merges a list")
    added = [_added_token(entry, entry.get("id"), path) for entry in _objects(data.get("added_tokens"), path)]
    # The library reads its own description of the steps; the vocabulary is put in apart, without control tokens.
    steps_data = {step: data.get(step) for step in ("normalizer", "pre_tokenizer")}
    cuts = known_cuts(steps_data["normalizer"], steps_data["pre_tokenizer"])
    max_whole = MAX_WHOLE if cuts is not None else min(MAX_WHOLE, try_tokenizer(steps_data, str(path)))
    frame: dict[str, Any] = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}} | steps_data
    shell = _library(lambda: Tokenizer.from_str(json.dumps(frame)), str(path))
    assert shell.pre_tokenizer is not None
    steps = Steps(shell.normalizer, shell.pre_tokenizer, bool(model.get("ignore_merges")), cuts, max_whole)
    found = _byte_level(vocab, _merge_pairs(merges, str(path)), added, steps, str(path))
    return replace(found, prefix=_post_processor_prefix(data.get("post_processor"), str(path)))


def _post_processor_prefix(post_processor: Any, source: str) -> tuple[int, ...]:
    """Ids that a tokenizer.json's post-processor puts before a text, as the library puts them before one token."""
    if post_processor is None:
        return ()
    frame = {
        "version": "1.0",
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
        "post_processor": post_processor,
    }
    encoding = _library(lambda: Tokenizer.from_str(json.dumps(frame)).encode("a"), source)
    place = encoding.special_tokens_mask.index(0) if 0 in encoding.special_tokens_mask else len(encoding.ids)
    for token, id in zip(encoding.tokens[:place], encoding.ids[:place], strict=True):
        _check_id(token, id, source)
    return tuple(encoding.ids[:place])


def known_cuts(normalizer: Any, pre_tokenizer: Any) -> Cuts | None:
    """Where text may be cut before the steps that a tokenizer.json describes; None for steps other than a `Scheme`'s."""
    nested = normalizer.get("normalizers") if isinstance(normalizer, dict) else None
    if isinstance(nested, list) and len(nested) == 1:
        normalizer = nested[0]
    if normalizer not in (None, {"type": "NFC"}):
        return None
    nested = pre_tokenizer.get("pretokenizers") if isinstance(pre_tokenizer, dict) else None
    steps = list(nested) if isinstance(nested, list) else [pre_tokenizer]
    digits = steps[:1] == [{"type": "Digits", "individual_digits": True}]
    if digits:
        del steps[0]
    pattern = None
    for known in (QWEN_PATTERN, LLAMA3_PATTERN):
        if steps[:1] == [{"type": "Split", "pattern": {"Regex": known}, "behavior": "Isolated", "invert": False}]:
            pattern = known
            del steps[0]
    if len(steps) != 1 or not isinstance(steps[0], dict) or steps[0].get("type") != "ByteLevel":
        return None
    if steps[0].get("add_prefix_space") is not False or steps[0].get("use_regex", True) is not (pattern is None):
        return None
    return Scheme(pattern, digits=digits).cuts()


def _read_vocab_and_merges(folder: Path) -> Vocabulary:
    """The layout of Qwen1.5 to Qwen2.5's slow tokenizer."""
    config_path = folder / "tokenizer_config.json"
    config = _read_json(config_path) if config_path.is_file() else {}
    kind = config.get("tokenizer_class") or "Qwen2Tokenizer"
    if kind not in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
        raise ValueError(
            f"{config_path}: tokenizer_class is {kind!r}, but vocab.json with merges.txt is only understood for "
            "Qwen2Tokenizer; such a model needs its tokenizer.json"
        )
    vocab = _read_json(folder / "vocab.json")
    path = folder / "merges.txt"
    lines = _read_text(path).replace("\r\n", "\n").split("\n")
    merges = _merge_pairs([line for line in lines if line and not line.startswith("#version:")], str(path))
    added = _added_of_config(folder, config)
    found = _byte_level(vocab, merges, added, QWEN2_SCHEME.steps(), str(folder / "vocab.json"))
    bos = config.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    ids = [token.id for token in added if token.content == bos]
    return replace(found, prefix=tuple(ids) if config.get("add_bos_token") is True else ())


def _added_of_config(folder: Path, config: Mapping[str, Any]) -> list[AddedToken]:
    path = folder / "tokenizer_config.json"
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict) and decoder:
        entries = zip(decoder, _objects(list(decoder.values()), path), strict=True)
        return [_added_token(entry, int(id) if id.isdecimal() else id, path) for id, entry in entries]
    path = folder / "added_tokens.json"
    if not path.is_file():
        raise ValueError(
            f"{folder}: vocab.json with merges.txt needs the control tokens too, as added_tokens_decoder in "
            "tokenizer_config.json or as added_tokens.json"
        )
    return [
        _added_token({"content": content, "special": _looks_special(content)}, id, path)
        for content, id in _read_json(path).items()
    ]


def _read_tiktoken(path: Path) -> Vocabulary:
    """Qwen-1: lines of "base64 rank"; the specials follow the ranks, and are looked for after normalisation."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_file(path, LARGEST_TOKENIZER).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}: line {number} is not a base64 token and its rank") from None
    if len(ranks) != QWEN1_RANKS or sorted(ranks.values()) != list(range(QWEN1_RANKS)):
        raise ValueError(f"{path}: expected the ranks 0 to {QWEN1_RANKS - 1} once each, found {len(ranks)} tokens")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError(f"{path}: not every single byte is a token")
    encoder = Encoder(TiktokenEngine(ranks, QWEN_PATTERN), QWEN2_SCHEME.cuts())
    added = [AddedToken(text, QWEN1_RANKS + i, special=True, normalized=True) for i, text in enumerate(QWEN1_SPECIALS)]
    return Vocabulary({rank: token for token, rank in ranks.items()}, added, encoder)


def _byte_level(
    vocab: Mapping[str, Any],
    merges: list[tuple[str, str]],
    added: Sequence[AddedToken],
    steps: Steps,
    source: str,
) -> Vocabulary:
    if not _are_ids(vocab.values()):
        for token, id in vocab.items():
            _check_id(token, id, source)
    specials = {token.content for token in added if token.special}
    if not specials.isdisjoint(vocab):
        # A control token the engine knew could come out of plain text: the engine forgets it and every way to it.
        vocab = {token: id for token, id in vocab.items() if token not in specials}
        merges = [(a, b) for a, b in merges if specials.isdisjoint((a, b, a + b))]
    for a, b in merges:
        if a not in vocab or b not in vocab or a + b not in vocab:
            raise ValueError(f"{source}: the merge of {a!r} and {b!r} is not between tokens of the vocabulary")
    model = _library(lambda: models.BPE(dict(vocab), merges, ignore_merges=steps.ignore_merges), source)
    engine = ByteLevelEngine(model, steps.normalizer, steps.pre_tokenizer)
    encoder = Encoder(engine, steps.cuts, max_whole=steps.max_whole)
    ordinary = dict(zip(vocab.values(), _bytes_of_tokens(vocab), strict=True))
    return Vocabulary(ordinary, added, encoder)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the other bytes for U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _bytes_of_tokens(tokens: Iterable[str]) -> Iterator[bytes]:
    """What each token stands for. All are looked up as one text, which takes a third of the time of one by one."""
    byte_of = _byte_of_character()
    tokens = list(tokens)
    joined = "".join(tokens)
    if set(joined) <= byte_of.keys():
        data = joined.translate({ord(character): byte for character, byte in byte_of.items()}).encode("latin-1")
        ends = list(accumulate(map(len, tokens), initial=0))
        yield from (data[start:end] for start, end in pairwise(ends))
        return
    for token in tokens:
        try:
            yield bytes(map(byte_of.__getitem__, token))
        except KeyError:  # not in the stand-in alphabet: a token that was written as it reads
            yield token.encode("utf-8", "replace")


def _merge_pairs(merges: Iterable[Any], source: str) -> list[tuple[str, str]]:
    given = list(merges)
    # a merge that is none becomes (None,), which is told below
    pairs = [
        tuple(merge.split(" "))
        if isinstance(merge, str)
        else tuple(merge)
        if isinstance(merge, list | tuple)
        else (None,)
        for merge in given
    ]
    if set(map(len, pairs)) - {2} or set(map(type, chain.from_iterable(pairs))) - {str}:
        number = next(i for i, pair in enumerate(pairs) if len(pair) != 2 or not all(isinstance(x, str) for x in pair))
        raise ValueError(f"{source}: merge {number + 1} is {given[number]!r}, not a pair of tokens")
    return cast(list[tuple[str, str]], pairs)


def _added_token(entry: Mapping[str, Any], id: Any, path: Path) -> AddedToken:
    content = entry.get("content")
    if not isinstance(content, str):
        raise ValueError(f"{path}: an added token's content is {content!r}, not text")
    _check_id(content, id, str(path))
    flags = {flag: bool(entry.get(flag)) for flag in ("special", "normalized", "lstrip", "rstrip", "single_word")}
    return AddedToken(content, id, **flags)


def _check_id(token: str, id: Any, source: str) -> None:
    if type(id) is not int or not 0 <= id < MAX_TOKEN_ID:
        raise ValueError(f"{source}: token {token!r} has the id {id!r}, not a number from 0 to {MAX_TOKEN_ID - 1}")


def _are_ids(ids: Collection[Any]) -> bool:
    """The same of all at once."""
    return not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < MAX_TOKEN_ID)


def _looks_special(token: str) -> bool:
    """Where a file lists added tokens without saying which control: those written <|like this|>."""
    return token.startswith("<|") and token.endswith("|>")


def _mentions_byte_level(step: Any) -> bool:
    if isinstance(step, dict):
        return step.get("type") == "ByteLevel" or any(map(_mentions_byte_level, step.get("pretokenizers") or ()))
    return False


def _objects(entries: Any, path: Path) -> list[dict[str, Any]]:
    entries = entries or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: its added tokens are not a list of objects")
    return entries


def _library(build: Callable[[], _T], source: str) -> _T:
    return guarded(build, f"{source}: not a usable tokenizer")


def _read_text(path: Path) -> str:
    try:
        return read_file(path, LARGEST_TOKENIZER).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a JSON object was expected, found {type(data).__name__}")
    return data
