"""The table of keys knows every key that the other trainers declare, and the documentation shows it."""

import dataclasses

import pytest
import transformers
import yaml

from qwenkit.compat.keys import TRUE
from qwenkit.compat.table import BEGIN, END, TABLE, canonical, markdown
from qwenkit.compat.translate import translate
from qwenkit.compat.values import OPTIMIZERS
from qwenkit.train.config import TrainConfig
from tests.conftest import ROOT

DECLARED = yaml.safe_load((ROOT / "tests" / "data" / "training" / "keys.yaml").read_text(encoding="utf-8"))
OURS = TrainConfig().settings()


@pytest.mark.parametrize("version", DECLARED)
def test_every_declared_key_is_known(version: str) -> None:
    assert set(DECLARED[version].split()) <= TABLE.keys()


def test_every_key_of_the_installed_transformers_is_known() -> None:
    assert {field.name for field in dataclasses.fields(transformers.Seq2SeqTrainingArguments)} <= TABLE.keys()


def test_the_documentation_shows_the_table() -> None:
    text = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    shown = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == markdown(), "run python -m qwenkit.compat.table docs/train.md"
    for key in TABLE:
        assert f"`{key}`" in shown


def test_every_key_is_what_the_table_says() -> None:
    """Noted keys give a note, refused ones an error that begins with their name, neutral ones nothing; names lead to settings."""
    base = translate({"model_name_or_path": "m", "do_train": True})
    for key, entry in TABLE.items():
        source = {"model_name_or_path": "m", "do_train": True, key: "some value"}
        if entry.name is not None:
            assert entry.name in OURS or entry.name in TABLE, key
            assert canonical(key) == entry.name
        elif entry.kind == "refused":
            with pytest.raises(ValueError, match=f"^{key} is 'some value', but "):
                translate(source)
        elif entry.kind in ("neutral", "noted"):
            found = translate(source)
            assert found.settings == base.settings, key
            said = [note for note in found.notes if note not in base.notes]
            assert said == ([f"{key} has no effect: {entry.text}"] if entry.kind == "noted" else []), key
        if entry.kind in ("noted", "refused"):
            for value in (None, False, 0, "", [], "none", entry.default):
                assert translate(source | {key: value}) == base, (key, value)


def test_keys_without_effect_for_one_reason_share_a_note() -> None:
    notes = translate({"model_name_or_path": "m", "bf16_full_eval": TRUE[0], "tf32": True}).notes
    assert "bf16_full_eval, tf32 have no effect: dtype says how is computed" in notes


def test_optimizers_lead_to_ours() -> None:
    for name, ours in OPTIMIZERS.items():
        assert TrainConfig.from_settings(translate({"model": "m", "optim": name}).settings).optim == ours
