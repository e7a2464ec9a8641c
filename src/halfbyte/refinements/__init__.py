"""What makes better solutions of a block's: they start from what a solver has rounded. To add one: one file, and one
line here."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from halfbyte.block_solvers import BLOCK_SOLVERS, BlockSolver, BlockTask, Solution, per_matrix
from halfbyte.recipe import Method
from halfbyte.refinements.learning import learned

Refinement = Callable[[BlockTask, Sequence[Solution]], Iterable[Solution]]
"""Gives better solutions in place of a solver's. The block itself stays as it is."""
REFINEMENTS: dict[str, Refinement] = {"learned": learned}
"""By their names in `Method.refinements`."""


def block_solver(method: Method) -> BlockSolver:
    """The solver of a method, its own where it sees whole blocks, else its matrix solver by `per_matrix`; then what
    refines a block."""
    solver = BLOCK_SOLVERS.get(method.solver) or per_matrix(method)
    refinements = [REFINEMENTS[name] for name in method.refinements if name in REFINEMENTS]
    if not refinements:
        return solver

    def solve_block(task: BlockTask) -> Iterator[Solution]:
        solutions = list(solver(task))
        for refine in refinements:
            solutions = list(refine(task, solutions))
        yield from solutions

    return solve_block
