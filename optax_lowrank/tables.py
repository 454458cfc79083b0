"""Tables for people: aligned text, and HTML in a notebook, from the same rows."""

import html
from collections.abc import Callable, Collection, Iterable, Sequence


class Table(str):
    """Text in columns that a notebook shows as an HTML table."""

    markup: str

    def _repr_html_(self) -> str:
        return self.markup


class Tabular:
    """What is shown as the table of its `_table`, by `str()` and in a notebook."""

    _table: Callable[[], Table]

    def __str__(self):
        return str.__str__(self._table())

    def _repr_html_(self) -> str:
        return self._table().markup


def table(rows: Iterable[Sequence[str]], numbers: Collection[int], foot: str = "") -> Table:
    """Rows, the first of them the head, as a `Table`.

    Args:
      rows: cells of text, as many in every row.
      numbers: the columns that are aligned at the right.
      foot: a line below the table.
    """
    head, *body = rows
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    pad = lambda i, cell: cell.rjust(widths[i]) if i in numbers else cell.ljust(widths[i])
    line = lambda row: "  ".join(pad(i, cell) for i, cell in enumerate(row)).rstrip()
    made = Table("\n".join([line(head), *map(line, body), *([foot] if foot else [])]))

    # notebooks have a style of their own for all cells: each needs its alignment; colours are the theme's
    side = lambda i: "right" if i in numbers else "left"
    tagged = lambda tag, row: "".join(
        f'<{tag} style="text-align:{side(i)}">{html.escape(cell)}</{tag}>'
        for i, cell in enumerate(row)
    )
    lines = "\n".join(f"<tr>{tagged('td', row)}</tr>" for row in body)
    below = f"\n<p>{html.escape(foot)}</p>" if foot else ""
    made.markup = (
        f'<table style="white-space:nowrap">\n'
        f"<thead><tr>{tagged('th', head)}</tr></thead>\n"
        f"<tbody>\n{lines}\n</tbody>\n</table>{below}"
    )
    return made
