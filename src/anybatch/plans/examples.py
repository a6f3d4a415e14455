"""What is known of examples, a column a fact: the one record that masks, weights, ranks and memories pass around."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.core.ids import as_integers


class Examples:
    """Facts on N examples: named columns of N integers (or floats, where a fact is a log-weight).

    An example is a pair of the data set, as an anchor or as a candidate; an explicit negative is one too. Any name
    may be used; those that the library's masks and weights know are

        anchor_id       equal where the anchors are the same text; -1 for an explicit negative, which has none
        text_id         of the positive, or of the explicit negative itself
        row             number in the data set; -1 for an explicit negative
        cluster         mined cluster; of a row in none a negative number of its own; of an explicit negative its row's
        task            data set of several
        owner           of an explicit negative the place of its pair in the batch, where their numbers differ; else -1
        log_ways        float: log of the ways that it has into a batch, over the rows that it stands for

    Args:
        columns: (N,) each. Integers of any width become int64; None stands for a column that is not there.

    Raises:
        AnybatchError: A column that is neither integers nor floats, or of another length.

    Example:
        >>> import torch
        >>> examples = Examples(row=torch.tensor([7, 2]), author=torch.tensor([0, 1]))
        >>> examples["author"].tolist(), examples.take(slice(1, 2))["row"].tolist(), examples.get("task")
        ([0, 1], [2], None)
    """

    def __init__(self, **columns: Tensor | None) -> None:
        checked: dict[str, Tensor] = {}
        for name in sorted(columns):  # in the same order on every rank and in every memory
            column = columns[name]
            if column is None:
                continue
            if not (isinstance(column, Tensor) and column.is_floating_point()):
                column = as_integers(name, column)
            first = next(iter(checked.values()), column)
            if column.ndim != 1 or len(column) != len(first):
                raise AnybatchError(
                    f"The column {name} of the examples has shape {tuple(column.shape)}; expected one entry an example"
                    + (f", ({len(first)},) as of {next(iter(checked))}." if checked else ", (N,).")
                )
            checked[name] = column.detach()
        self.columns: Mapping[str, Tensor] = checked

    @classmethod
    def _of(cls, columns: Mapping[str, Tensor]) -> Examples:
        """Columns that were checked before."""
        examples = cls.__new__(cls)
        examples.columns = columns
        return examples

    def __len__(self) -> int:
        """N; 0 also where nothing is known."""
        return len(next(iter(self.columns.values()), ()))

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> Tensor:
        """(N,) a column, which must be there."""
        if name not in self.columns:
            raise AnybatchError(
                f"A mask or weight asks for the column {name!r} of the examples, which has "
                f"{', '.join(self.columns) or 'none'}. Give it: Examples({name}=...), or RowTable(..., "
                f"columns={{{name!r}: ...}})."
            )
        return self.columns[name]

    def get(self, name: str) -> Tensor | None:
        """(N,) a column, or None where it is not there."""
        return self.columns.get(name)

    def take(self, places: slice | Tensor) -> Examples:
        """Some of the examples."""
        return self._of({name: column[places] for name, column in self.columns.items()})

    def with_columns(self, **columns: Tensor) -> Examples:
        """The same with further columns, or other ones in their place."""
        return Examples(**{**self.columns, **columns})

    def followed_by(self, others: Examples) -> Examples:
        """These examples and then others, of which the same must be known."""
        if self.columns.keys() != others.columns.keys():
            raise AnybatchError(
                f"Examples with the columns {', '.join(self.columns)} stand beside examples with "
                f"{', '.join(others.columns)}. Give the same columns for both."
            )
        return self._of({name: torch.cat([self[name], others[name]]) for name in self.columns})

    def packed(self) -> Tensor:
        """(N, F) int64, all columns: what travels between ranks and what a memory keeps.

        Floats are in it as the 64 bits of a float64. `unpacked` is the inverse; nobody else looks inside.
        """
        columns = [
            column.double().view(torch.int64) if column.is_floating_point() else column
            for column in self.columns.values()
        ]
        return torch.stack(columns, dim=1)

    def unpacked(self, packed: Tensor) -> Examples:
        """Examples with the columns of these, from what `packed` made of theirs."""
        rows = packed.T.contiguous().unbind()
        return self._of(
            {
                name: row.view(torch.float64).to(column.dtype) if column.is_floating_point() else row
                for (name, column), row in zip(self.columns.items(), rows, strict=True)
            }
        )

    def gathered(self, sizes: list[int]) -> Examples:
        """Those of all ranks, one after the other, each with `sizes[rank]`. One collective for all columns."""
        return self.unpacked(distributed.gather_rows(self.packed(), sizes)) if self.columns else self
