"""The matcher against the tokenizers library, flag by flag."""

import unicodedata

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


def test_words_and_blanks_are_the_librarys_in_every_place_of_the_basic_plane() -> None:
    """Beside every character: one token that stands only outside of words, one that takes blanks along.

    Characters that one side's tables do not know yet (they follow different versions of Unicode) are left out.
    """
    library = Library(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    library.add_tokens([LibraryToken("<w>", normalized=False, single_word=True)])
    library.add_tokens([LibraryToken("<b>", normalized=False, lstrip=True, rstrip=True)])
    ids = library.get_vocab()
    matcher = AddedTokenMatcher(
        [
            AddedToken("<w>", ids["<w>"], special=False, single_word=True),
            AddedToken("<b>", ids["<b>"], special=False, lstrip=True, rstrip=True),
        ]
    )
    places = [*range(1, 0xD800), *range(0xE000, 0x10000), *range(0x1F100, 0x1F200), *range(0x1D400, 0x1D800)]
    characters = [chr(place) for place in places if unicodedata.category(chr(place)) != "Cn"]
    wrong = []
    for start in range(0, len(characters), 64):
        text = "".join(f"<w>{character}|<b>{character}<b>|" for character in characters[start : start + 64])
        encoding = library.encode(text)
        expected = [id or text[a:b] for id, (a, b) in zip(encoding.ids, encoding.offsets, strict=True)]
        if list(matcher.split(text)) != expected:
            wrong.append((hex(ord(characters[start])), list(matcher.split(text)), expected))
    assert not wrong, wrong[:1]
