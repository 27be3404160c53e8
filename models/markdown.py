"""Tables in Markdown."""

from collections.abc import Collection, Sequence


def markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> str:
    """A Markdown table, its columns aligned.

    Args:
        heading: the columns' names.
        rows: their cells.
        right: names of the columns that are set flush right.

    Raises:
        ValueError: a row of another length than the heading.
    """
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    ends = [":" if name in right else "-" for name in heading]
    rule = ["-" * (width - 1) + end for width, end in zip(widths, ends, strict=True)]
    lines = []
    for line in [heading, rule, *rows]:
        cells = zip(heading, line, widths, strict=True)
        lines.append([text.rjust(width) if name in right else text.ljust(width) for name, text, width in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
