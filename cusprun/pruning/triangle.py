"""Symmetric matrices by their upper half, in blocks and in place, for those that fill memory on their own.

The blocks below the diagonal are left to work in: a factor, or its inverse, stands there beside the matrix
that it belongs to, so that several ridges, or a try that fails, cost no copy. The block algorithms are the
left-looking Cholesky factorisation and the inversion of a triangle from its last column on (Golub and Van
Loan, Matrix Computations, 4.2.9 and 3.1.8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_BLOCK = 192
"""Rows of a block: products of these reach the full rate, and little beyond a triangle is computed."""
_RIDGE_STEPS = 12


def spans(size: int, block: int | None = None) -> list[tuple[int, int]]:
    """Return the first position and the one behind the last of each block of ``size`` entries."""
    block = block or _BLOCK
    return [(start, min(start + block, size)) for start in range(0, size, block)]


def add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add ``rows^T rows`` to the upper half of ``total`` in place.

    ``rows`` is [tokens, n], in the type of the products; ``total`` [n, n], in that of their sum.
    """
    for start, stop in spans(total.shape[0]):
        add_product(total[start:stop, start:], rows[:, start:stop], rows[:, start:])


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left^T right`` to ``total`` in place, with products in their own type; [k, m] and [k, n]."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
        return
    for start, stop in spans(len(total)):
        total[start:stop].add_(left[:, start:stop].T @ right)


def dot(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the sum of the products of entries of two matrices, summed in float64."""
    return sum(
        float((left[start:stop].double() * right[start:stop]).sum()) for start, stop in spans(len(left))
    )


def columns_of(matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the columns ``index`` [k] of the symmetric matrix of which the upper half is given: [n, k]."""
    rows = torch.arange(matrix.shape[0], device=matrix.device).unsqueeze(1)
    return torch.where(rows <= index, matrix[:, index], matrix[index].T)


def quadratic(matrix: torch.Tensor, rows: torch.Tensor) -> float:
    """Return the sum over ``rows`` [k, n] of x A x^T, A by its upper half."""
    total = 0.0
    for start, stop in spans(matrix.shape[0]):
        product = rows[:, start:stop] @ _diagonal_block(matrix, start, stop)
        product.addmm_(rows[:, :start], matrix[:start, start:stop], alpha=2)
        total += float((product * rows[:, start:stop]).sum())
    return total


def _diagonal_block(matrix: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    upper = matrix[start:stop, start:stop].triu()
    return upper + upper.triu(1).T


@dataclass(frozen=True)
class Factor:
    """L, lower triangular, with A + ridge * I = L L^T; ``ridge`` is the one that was needed.

    Its blocks below the diagonal stand in ``matrix``, those on the diagonal in ``diagonal``.
    """

    matrix: torch.Tensor
    diagonal: list[torch.Tensor]
    ridge: float

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Make ``rows`` L^-T of ``rows`` [k, n] in place, and return it."""
        for (start, stop), root in zip(spans(len(self.matrix)), self.diagonal, strict=True):
            part = rows[:, start:stop]
            part.addmm_(rows[:, :start], self.matrix[start:stop, :start].T, alpha=-1)
            rows[:, start:stop] = torch.linalg.solve_triangular(root.T, part, upper=True, left=False)
        return rows

    def solve(self, rows: torch.Tensor) -> torch.Tensor:
        """Make ``rows`` (A + ridge * I)^-1 of ``rows`` [k, n] in place, and return it."""
        self.forward(rows)
        for (start, stop), root in reversed(list(zip(spans(len(self.matrix)), self.diagonal, strict=True))):
            part = rows[:, start:stop]
            part.addmm_(rows[:, stop:], self.matrix[stop:, start:stop], alpha=-1)
            rows[:, start:stop] = torch.linalg.solve_triangular(root, part, upper=False, left=False)
        return rows

    def inverted(self) -> Inverse:
        """Put (A + ridge * I)^-1 in the place of L, which is no more."""
        edges, matrix = spans(len(self.matrix)), self.matrix
        own = [
            torch.linalg.solve_triangular(
                root, torch.eye(len(root), dtype=root.dtype, device=root.device), upper=False
            )
            for root in self.diagonal
        ]
        for column in reversed(range(len(edges))):
            start, stop = edges[column]
            for row in reversed(range(column + 1, len(edges))):
                top, bottom = edges[row]
                block = own[row] @ matrix[top:bottom, start:stop]
                block.addmm_(matrix[top:bottom, stop:top], matrix[stop:top, start:stop])
                matrix[top:bottom, start:stop] = -(block @ own[column])
        return Inverse(matrix, _squared(matrix, own))


@dataclass(frozen=True)
class Inverse:
    """(A + ridge * I)^-1, which stands below the diagonal of ``matrix``; ``on_diagonal`` is the rest: [n]."""

    matrix: torch.Tensor
    on_diagonal: torch.Tensor

    def diagonal(self) -> torch.Tensor:
        """Return the entries on the diagonal: [n]."""
        return self.on_diagonal.clone()

    def columns(self, index: torch.Tensor) -> torch.Tensor:
        """Return some columns: [n, k] for ``index`` [k]."""
        rows = torch.arange(len(self.matrix), device=index.device)
        found = torch.where(index < rows.unsqueeze(1), self.matrix[:, index], self.matrix[index].T)
        found[index, rows[: len(index)]] = self.on_diagonal[index]
        return found


def _squared(matrix: torch.Tensor, own: list[torch.Tensor]) -> torch.Tensor:
    """Put M^T M in the place of M, lower triangular with the blocks ``own``; return what is on its diagonal.

    From the first rows on, which no later ones need.
    """
    diagonal = []
    for (start, stop), root in zip(spans(len(matrix)), own, strict=True):
        below = matrix[stop:, start:stop].T
        block = (root.T @ root).addmm_(below, below.T)
        row = (root.T @ matrix[start:stop, :start]).addmm_(below, matrix[stop:, :start])
        diagonal.append(block.diagonal().clone())
        matrix[start:stop, :start] = row
        matrix[start:stop, start:stop] = matrix[start:stop, start:stop].triu() + block.tril(-1)
    return torch.cat(diagonal)


def factored(matrix: torch.Tensor, ridge: float) -> Factor:
    """Factorise ``matrix + ridge * I``, growing the ridge until that can be done.

    ``matrix`` [n, n] is given by its upper half, with the diagonal, and keeps it; below, it is written on.
    """
    ridge = ridge or 1.0
    for step in range(_RIDGE_STEPS):
        diagonal = _factorise(matrix, ridge * 10**step)
        if diagonal is not None:
            return Factor(matrix, diagonal, ridge * 10**step)
    raise AssertionError("a positive semi-definite matrix plus a ridge has a Cholesky factor")


def _factorise(matrix: torch.Tensor, ridge: float) -> list[torch.Tensor] | None:
    """Leave the factor's blocks below the diagonal; return those on it, None where there is no factor."""
    diagonal: list[torch.Tensor] = []
    for start, stop in spans(len(matrix)):
        left = matrix[start:stop, :start]
        block = _diagonal_block(matrix, start, stop)
        block.diagonal().add_(ridge)
        block.addmm_(left, left.T, alpha=-1)
        root, info = torch.linalg.cholesky_ex(block)
        if int(info) or not bool(torch.isfinite(root).all()):
            return None
        diagonal.append(root)
        below = matrix[start:stop, stop:].T - matrix[stop:, :start] @ left.T
        matrix[stop:, start:stop] = torch.linalg.solve_triangular(root.T, below, upper=True, left=False)
    return diagonal
