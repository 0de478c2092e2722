"""Text of conversations is not ours to trust: what must be done before it leaves the pipeline."""


def well_formed(text: str) -> str:
    """`text` with lone surrogates replaced by `?`, as JSON logs can hold them and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def printable(text: str) -> str:
    """`text` with control characters written as escapes, so that it cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
