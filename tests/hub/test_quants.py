"""One GGUF of a repository by the name of its quantization, and mirrors that redirect."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from qwenkit.hub.fetch import choose_gguf
from qwenkit.hub.find import find_model, pull_model
from tests.hub import hub_server as hubs
from tests.hub.hub_server import HubServer, hub_server, tiny_model, use_hub

NAMES = [
    "README.md",
    "tiny-Q4_K_M.gguf",
    "tiny-q8_0.gguf",
    "tiny-fp16-00001-of-00002.gguf",
    "tiny-fp16-00002-of-00002.gguf",
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with hub_server({"org/tiny-gguf": {name: name.encode() * 9 for name in NAMES}}) as server:
        use_hub(monkeypatch, tmp_path, server.url)
        yield server


@pytest.mark.parametrize("hub_name", ["", "hf:", "ms:"])
@pytest.mark.parametrize(
    ("name", "first", "count"), [("q4_k_m", NAMES[1], 1), ("Q8_0", NAMES[2], 1), ("fp16", NAMES[3], 2)]
)
def test_one_quant_is_fetched_with_all_its_parts(
    hub: HubServer, hub_name: str, name: str, first: str, count: int
) -> None:
    path = pull_model(f"{hub_name}org/tiny-gguf:{name}", progress=False)
    assert path.name == first
    assert path.read_bytes() == first.encode() * 9
    assert len(list(path.parent.iterdir())) == count
    assert find_model(f"{hub_name}org/tiny-gguf:{name}", download=False) == path
    with pytest.raises(FileNotFoundError, match="not on this disk"):
        find_model(f"{hub_name}org/tiny-gguf:q2_k", download=False)


def test_into_a_folder(hub: HubServer, tmp_path: Path) -> None:
    path = pull_model("org/tiny-gguf:q8_0", into=tmp_path / "here", progress=False)
    assert path == tmp_path / "here" / "tiny-q8_0.gguf"
    assert {each.name for each in path.parent.iterdir()} == {"tiny-q8_0.gguf", "SHA256SUMS"}


@pytest.mark.parametrize("name", ["org/tiny-gguf", "org/tiny-gguf:q2_k"])
def test_a_refusal_shows_names_that_work(hub: HubServer, name: str) -> None:
    with pytest.raises(ValueError, match=r"org/tiny-gguf:Q4_K_M.*org/tiny-gguf:q8_0"):
        pull_model(name, progress=False)


def test_two_models_in_one_repository_are_told_apart() -> None:
    names = ["a-q8_0.gguf", "b-q8_0.gguf", "b.q4_0.gguf", "c-f16-00001-of-00003.gguf"]
    assert choose_gguf(names, "org/x", "A-Q8_0") == ["a-q8_0.gguf"]
    assert choose_gguf(names, "org/x", "q4_0") == ["b.q4_0.gguf"]
    with pytest.raises(ValueError, match="names 0 GGUF files; there are: org/x:a-q8_0, org/x:b-q8_0, org/x:q4_0"):
        choose_gguf(names, "org/x", "q8_0")
    with pytest.raises(ValueError, match="comes in 3 parts, but only 1 are there"):
        choose_gguf(names, "org/x", "f16")


@pytest.mark.parametrize("status", [302, 307, 308])
def test_a_mirror_that_redirects_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int) -> None:
    """It sends on requests for files without the header that names their commit."""
    real = hubs._Handler._resolve
    held = {"org/tiny": tiny_model()}
    with hub_server(held) as origin, hub_server(held) as mirror:

        def resolve(self: hubs._Handler, repo: str, commit: str, name: str) -> None:
            if self.hub is mirror:
                place = f"{origin.url}/{repo}/resolve/{commit}/{quote(name)}"
                return self._reply(status, b"", {"Location": place})
            return real(self, repo, commit, name)

        monkeypatch.setattr(hubs._Handler, "_resolve", resolve)
        use_hub(monkeypatch, tmp_path, mirror.url)
        folder = pull_model("org/tiny", progress=False)
        assert find_model("org/tiny", download=False) == folder
