"""A page as a browser's parser sees it, as far as the standard library can."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Reading(HTMLParser):
    """Elements, attributes and text; raises where tags do not match."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []  # (tag, name, value)
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, name: str) -> list[str]:
        """Values of every attribute of that name."""
        return [value for _, found, value in self.attributes if found == name]


def assert_self_contained(page: str) -> Reading:
    """No script, no handler, nothing to load, identifiers unique."""
    reading = Reading(page)
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "img", "foreignobject"} & set(
        reading.tags
    )
    for _, name, value in reading.attributes:
        assert not name.startswith("on"), name
        if name in ("href", "src", "xlink:href", "action", "srcset"):
            assert value.startswith("#"), value
        assert "url(" not in value or "url(#" in value
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    ids = reading.values("id")
    assert len(ids) == len(set(ids))
    policy = [value for value in reading.values("content") if value.startswith("default-src")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    return reading
