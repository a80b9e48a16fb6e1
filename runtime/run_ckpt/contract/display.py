"""Names as people may see them: whatever a file calls something, it is text and no command to a terminal."""


def shown(text: object, *, lines: bool = False) -> str:
    """Return ``text`` with an escape for each character that is not printed: control codes, halves of characters.

    lines: let line ends be, in a message of several lines.
    """
    text = str(text)
    if text.isprintable():
        return text
    kept = "\n" if lines else ""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)
