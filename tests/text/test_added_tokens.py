"""The matcher against the tokenizers library, flag by flag."""

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken as LibraryToken
from tokenizers import Tokenizer as Library
from tokenizers import models

from qwenkit.text.added_tokens import AddedToken, AddedTokenMatcher

contents = st.text("ab<|", min_size=1, max_size=4)
flags = st.fixed_dictionaries({name: st.booleans() for name in ("lstrip", "rstrip", "single_word")})


@settings(deadline=None)
@given(tokens=st.dictionaries(contents, flags, min_size=1, max_size=4), text=st.text("ab<| \n的", max_size=20))
@example(tokens={"a": {"lstrip": True, "rstrip": True, "single_word": True}}, text="b  a \n a的 ab a")
@example(tokens={"<|": {"lstrip": False, "rstrip": False, "single_word": False}}, text="<<||")
def test_splits_like_the_library(tokens: dict[str, dict[str, bool]], text: str) -> None:
    library = Library(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    library.add_tokens([LibraryToken(content, normalized=False, **flag) for content, flag in tokens.items()])
    matcher = AddedTokenMatcher(
        AddedToken(content, id, special=False, **tokens[content]) for content, id in library.get_vocab().items() if id
    )
    encoding = library.encode(text)
    expected: list[str | int] = [
        id or text[start:stop] for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
    ]
    assert list(matcher.split(text)) == expected


def test_no_tokens() -> None:
    assert list(AddedTokenMatcher([]).split("abc")) == ["abc"]
    assert list(AddedTokenMatcher([]).split("")) == []
