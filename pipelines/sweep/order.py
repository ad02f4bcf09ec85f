"""A sweep as the command line and the Python API ask for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nayer_edge.errors import UsageError

from ..actions import Time, on_bank, read_recipe, targets_in

if TYPE_CHECKING:
    from ..recipes.schema import Recipe
    from ..show import Display
    from .record import Sweep


@dataclass(frozen=True)
class SweepOrder:
    """A sweep as it was asked for.

    Attributes:
        recipe: what its students share; None: continue the sweep in `out`.
        bank: the finished run whose images they start with; None: the sweep makes them.
        out: the folder of the sweep.
        students: models; empty: those that are proposed for the teacher.
        seconds: time for all of them; None: a part of what their runs would take alone.
    """

    recipe: Recipe | None
    bank: Path | None
    out: Path
    students: tuple[str, ...]
    seconds: float | None

    @classmethod
    def typed(
        cls,
        name: str,
        students: Iterable[str],
        budget: str | None,
        out: Path | None = None,
        settings: list[str] | None = None,
        *,
        fresh: bool = False,
    ) -> SweepOrder:
        """From what was typed.

        Args:
            name: a recipe, a run folder, whose bank is taken, or the folder of a sweep to continue.
            students: models, also several separated by commas; none: the recipe's.
            budget: a duration such as "3h"; None: the recipe's.

        Raises:
            UsageError: unknown recipe, invalid settings, or not a duration; see also `shared_bank.require_fit`.
            IntegrityError: the bank was altered.
        """
        from ..costs.budget import planned_keys
        from ..recipes.loading import run_folder
        from ..recipes.settings import keys_of, replaced_keys
        from ..shared_bank import started
        from .record import RECORD

        seconds, models = Time.typed(budget).budget, tuple(targets_in(students))
        if (Path(name) / RECORD).is_file():
            if settings or fresh or (out is not None and out.resolve() != Path(name).resolve()):
                raise UsageError(
                    f"{name} is the folder of a sweep, which continues with its original settings.",
                    fix="Leave out --set, --out and --fresh, or name its recipe or run instead.",
                )
            return cls(None, None, Path(name), models, seconds)
        recipe = read_recipe(name, settings)
        if recipe.sweep is not None:
            models = models or recipe.sweep.students
            seconds = recipe.sweep.seconds if seconds is None else seconds
        bank = run_folder(name)
        held = bank or recipe.student.bank
        # Without a budget, the run that makes the bank has the recipe's own sizes.
        planned = set(keys_of(settings or ())) & planned_keys() if seconds is not None or held else set()
        if settings and held and not planned:
            asked = on_bank(recipe, Path(held))
            planned.update(replaced_keys(settings, asked, started(asked)[0]))
        if planned:
            raise UsageError(
                f"A sweep sets {', '.join(sorted(planned))} itself for every student, so --set has no effect.",
                why="Sizes are planned, and the rest comes with the memory bank." if held else "",
                fix="Leave out --set for these keys.",
            )
        return cls(recipe, bank, out or Path("runs") / f"{recipe.name}-sweep", models, seconds)

    def execute(self, *, ray: str | None = None, fresh: bool = False, display: Display | None = None) -> Sweep:
        """Finds the smallest student that passes the policy, of several that start with the same images.

        Args:
            ray: address of a Ray cluster, whose workers train the students; None: this machine does.

        Raises:
            NayerEdgeError: see `nayer_edge.pipelines.sweep.running.run_sweep`.
        """
        from .running import run_sweep

        return run_sweep(
            self.recipe, self.bank, self.out, self.students, self.seconds, ray=ray, fresh=fresh, display=display
        )
