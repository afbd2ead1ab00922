"""From a data set's files to items that fit, with every decision about a bad record written down.

In: a DataSource and the TrainConfig. Out: `Prepared` records in the order of the files, each with its items and its `Issue`s.
`Report` counts them; `check` reads everything before training and only reports. Nothing is left out without an issue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from qwenkit.text.chat import ChatFormat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.train.config import TrainConfig
from qwenkit.train.data.fields import BadRecordError
from qwenkit.train.data.files import Record, file_kind, read_records
from qwenkit.train.data.formats import RecordReader
from qwenkit.train.data.registry import DataSource, find_sources
from qwenkit.train.data.render import Item, Renderer, fit, num_targets, samples_of

EXAMPLES = 20  # issues of each kind that a report shows in full
OVERLONG, EMPTY_TEXT = "over-long", "empty text"


@dataclass(frozen=True)
class Issue:
    """Something wrong with a record. action: error, drop, truncate, split, or keep (a note)."""

    dataset: str
    file: str
    line: int
    kind: str
    message: str
    action: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}: {self.message}"


@dataclass(frozen=True)
class Prepared:
    """One record: what it became, what was wrong with it, and where it stands: number of its file, and its Record's places."""

    items: list[Item]
    issues: list[Issue]
    file: int
    record: Record


class DataError(ValueError):
    """Records that policy `error` does not let pass; `report` has all of them."""

    def __init__(self, report: Report) -> None:
        super().__init__(report.errors_text())
        self.report = report


@dataclass
class Report:
    """What reading data sets gave: sizes of each, how often each kind of issue came up, and some of them in full."""

    datasets: dict[str, dict[str, int]] = field(default_factory=dict)
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """(data set, kind, action) -> number of records."""
    issues: list[Issue] = field(default_factory=list)
    """The first of each kind, at most `EXAMPLES`."""
    refusal: str | None = None
    """Why a run would not begin with this data, other than for its errors."""
    notes: list[str] = field(default_factory=list)
    """What the registry says that has no effect."""

    def add(self, dataset: str, prepared: Prepared) -> None:
        sizes = self.datasets.setdefault(
            dataset, dict.fromkeys(("records", "samples", "tokens", "targets", "longest"), 0)
        )
        sizes["records"] += 1
        sizes["samples"] += len(prepared.items)
        for item in prepared.items:
            lengths = [len(sample.ids) for sample in samples_of(item)]
            sizes["tokens"] += sum(lengths)
            sizes["targets"] += num_targets(item)
            sizes["longest"] = max(sizes["longest"], *lengths)
        for issue in prepared.issues:
            key = (issue.dataset, issue.kind, issue.action)
            self.counts[key] += 1
            if self.counts[key] <= EXAMPLES:
                self.issues.append(issue)

    def merge(self, other: Report) -> None:
        """Add what another report says, which was made after this one."""
        for name, sizes in other.datasets.items():
            mine = self.datasets.setdefault(name, dict.fromkeys(sizes, 0))
            for size, value in sizes.items():
                mine[size] = max(mine[size], value) if size == "longest" else mine[size] + value
        shown = Counter((issue.dataset, issue.kind, issue.action) for issue in self.issues)
        for issue in other.issues:
            key = (issue.dataset, issue.kind, issue.action)
            shown[key] += 1
            if shown[key] <= EXAMPLES:
                self.issues.append(issue)
        self.counts += other.counts

    @property
    def num_errors(self) -> int:
        return sum(count for (_, _, action), count in self.counts.items() if action == "error")

    @property
    def num_dropped(self) -> int:
        return sum(count for (_, _, action), count in self.counts.items() if action == "drop")

    @property
    def num_records(self) -> int:
        return sum(sizes["records"] for sizes in self.datasets.values())

    def errors_text(self) -> str:
        errors = [issue for issue in self.issues if issue.action == "error"]
        shown = "".join(f"\n  {issue}" for issue in errors[:10])
        more = f"\n  and {self.num_errors - 10} more" if self.num_errors > 10 else ""
        policy = "bad_samples and overlong say what is done with such"
        return f"{self.num_errors} records cannot be used ({policy}):{shown}{more}"

    def __str__(self) -> str:
        lines = [f"note: {note}" for note in self.notes]
        for name, sizes in self.datasets.items():
            lines.append(
                f"{name}: {sizes['records']} records, {sizes['samples']} samples, {sizes['tokens']} tokens, "
                f"{sizes['targets']} of them learned, longest sample {sizes['longest']}"
            )
            for (dataset, kind, action), count in sorted(self.counts.items()):
                if dataset == name:
                    lines.append(f"  {kind}: {count} ({action})")
                    shown = [i for i in self.issues if (i.dataset, i.kind, i.action) == (dataset, kind, action)]
                    lines += [f"    {issue.file}:{issue.line}: {issue.message}" for issue in shown[:5]]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        counts = [[*key, count] for key, count in self.counts.items()]
        return {"datasets": self.datasets, "counts": counts, "issues": [asdict(issue) for issue in self.issues]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        counts = Counter({(dataset, kind, action): count for dataset, kind, action, count in data["counts"]})
        return cls(data["datasets"], counts, [Issue(**issue) for issue in data["issues"]])


class Pipeline:
    """Reads one source's records and applies the policies. Raises ValueError for settings that do not go together."""

    def __init__(self, config: TrainConfig, source: DataSource, tokenizer: Tokenizer, chat: ChatFormat | None) -> None:
        self.source = source
        self.config = self._config = config
        self.tokenizer = tokenizer
        self.chat = chat
        variables = dict(text.split("=", 1) for text in config.variables)
        self._reader = RecordReader(source, config.stage, system=config.system, variables=variables)
        self._renderer = Renderer(config, tokenizer, chat)
        # Pre-training with packing lays texts end to end and cuts that; no text is too long.
        self._limit = None if config.stage == "pt" and config.packs else config.cutoff_len

    def records(self, file: int = 0, cursor: int = 0, line: int = 1, taken: int = 0) -> Iterator[Prepared]:
        """All records from the given place on: a file's number, `end` and `end_line` of the record before, and how many that
        were (max_samples counts from the beginning)."""
        return (self.prepare(record, number) for number, record in self.read(file, cursor, line, taken))

    def read(self, file: int = 0, cursor: int = 0, line: int = 1, taken: int = 0) -> Iterator[tuple[int, Record]]:
        """The records that `records` prepares, each with the number of its file."""
        limit = self._config.max_samples
        return islice(self._read(file, cursor, line), None if limit is None else max(0, limit - taken))

    def _read(self, file: int, cursor: int, line: int) -> Iterator[tuple[int, Record]]:
        for number in range(file, len(self.source.files)):
            path = self.source.files[number]
            for record in read_records(path, cursor, line, blocks=self.source.formatting == "wiki"):
                if not self._is_heading(record):
                    yield number, record
            cursor, line = 0, 1

    def one(self, file: int, cursor: int, line: int) -> Prepared:
        """The record that begins at a place noted earlier."""
        record = next(read_records(self.source.files[file], cursor, line, blocks=self.source.formatting == "wiki"))
        return self.prepare(record, file)

    def _is_heading(self, record: Record) -> bool:
        text = (record.value or {}).get("text", "")
        return self.source.formatting == "wiki" and text.startswith("=")

    def prepare(self, record: Record, file: int) -> Prepared:
        """A record's items and issues. Bad records give no items; nothing is raised."""
        path = self.source.files[file]
        issues: list[Issue] = []

        def note(kind: str, message: str, action: str) -> None:
            issues.append(Issue(self.source.name, path.name, record.line, kind, message, action))

        bad = self._config.bad_samples
        if record.value is None:
            note("not readable", record.error or "", bad)
            return Prepared([], issues, file, record)
        try:
            example = self._reader.read(record.value, file_kind(path))
            rendering = self._renderer.render(example, f"{path.name}:{record.line}")
            for item in rendering.items:
                if not all(sample.num_targets for sample in samples_of(item)):
                    raise BadRecordError("no target", "there is no token to learn")
        except BadRecordError as error:
            # Data sets of plain text have blank rows between paragraphs, as files have blank lines.
            note(error.kind, str(error), "drop" if error.kind == EMPTY_TEXT else bad)
            return Prepared([], issues, file, record)
        for name in sorted(self._reader.unfilled):
            note("unfilled name", f"{{{{{name}}}}} stands in the text; variables: {name}=… fills it", "keep")
        for kind, message in (*self._reader.notes, *rendering.notes):
            note(kind, message, "keep")
        return Prepared(self._fitted(rendering.items, note), issues, file, record)

    def _fitted(self, items: list[Item], note: Any) -> list[Item]:
        fitted: list[Item] = []
        for item in items:
            longest = max(len(sample.ids) for sample in samples_of(item))
            if self._limit is None or longest <= self._limit:
                fitted.append(item)
                continue
            policy = self._config.overlong
            if policy == "split" and len(samples_of(item)) > 1:
                policy = "truncate"
            parts = [] if policy == "error" else fit(item, self._limit, policy)
            message = f"{longest} tokens, cutoff_len is {self._limit}"
            if not parts and policy not in ("error", "drop"):
                message, policy = f"{message}, and nothing to learn is left of it", "drop"
            elif policy == "split":
                message = f"{message}; cut into {len(parts)}"
            note(OVERLONG, message, policy)
            fitted += parts
        return fitted


def check(config: TrainConfig, tokenizer: Tokenizer, chat: ChatFormat | None) -> Report:
    """Read every record of `dataset` and `eval_dataset` and report; whatever is wrong with one, nothing is raised.

    Raises ValueError or FileNotFoundError only for data sets that cannot be found or files that are damaged as a whole.
    """
    report = Report()
    used = {"dataset": 0, "eval_dataset": 0}
    for setting in used:
        for source in find_sources(getattr(config, setting), Path(config.dataset_dir)):
            pipeline = Pipeline(config, source, tokenizer, chat)
            report.notes += source.notes
            for prepared in pipeline.records():
                report.add(source.name, prepared)
                used[setting] += bool(prepared.items)
    if not report.num_errors:
        report.refusal = _refusal(config, used)
    return report


def _refusal(config: TrainConfig, used: dict[str, int]) -> str | None:
    for setting, count in used.items():
        if getattr(config, setting) and not count:
            return f"{setting}: every record was dropped, or there is none"
    try:
        split_size(config, used["dataset"])
    except ValueError as error:
        return str(error)
    return None


def split_size(config: TrainConfig, count: int) -> int:
    """How many of `count` records are split off for evaluation. ValueError where nothing is left of either part."""
    if not config.val_size or config.eval_dataset:
        return 0
    wanted = round(config.val_size * count) if config.val_size < 1 else int(config.val_size)
    if not 0 < wanted < count:
        raise ValueError(
            f"val_size {config.val_size:g} splits {wanted} of {count} records off; both parts need at least one"
        )
    return wanted
