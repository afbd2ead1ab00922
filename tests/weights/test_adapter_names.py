"""Names of an adapter's tensors, whatever they were saved through."""

import pytest

from qwenkit.weights.adapter_names import is_original, plain_name, replaced_name

MODULE = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    "name",
    [
        f"base_model.model.{MODULE}.lora_A.weight",
        f"{MODULE}.lora_A.weight",
        f"base_model.model.{MODULE}.lora_A.default.weight",
        f"base_model.model._orig_mod.{MODULE}.lora_A.poet.weight",
        f"module.base_model.model.{MODULE}.lora_A.weight",
        f"_orig_mod.base_model.model.{MODULE}.lora_A.weight",
        "base_model.model.model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.down_proj.lora_A.weight",
    ],
)
def test_words_of_wrappers_are_no_part_of_a_name(name: str) -> None:
    assert plain_name(name) == f"{MODULE}.lora_A.weight"


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("base_model.model.lm_head.modules_to_save.weight", "lm_head.weight"),
        ("base_model.model.lm_head.base_layer.weight", "lm_head.weight"),
        (f"base_model.model.{MODULE}.bias", f"{MODULE}.bias"),
    ],
)
def test_whole_parameters(name: str, plain: str) -> None:
    assert replaced_name(plain_name(name)) == plain
    assert is_original("lm_head.original_module.weight")
    assert not is_original(plain)


@pytest.mark.parametrize("end", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_magnitudes(end: str) -> None:
    assert plain_name(f"base_model.model.{MODULE}.{end}") == f"{MODULE}.{end}"
    with_name = end.replace("vector", "vector.default")
    assert plain_name(f"{MODULE}.{with_name}") == f"{MODULE}.{end}"
