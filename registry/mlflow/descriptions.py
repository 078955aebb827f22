"""The descriptions of a line's experiments and registered models: pure functions.

Each says what it holds, and where the line's history and weights are. One that begins otherwise
was written by a user and stays.
"""

from typing import NamedTuple

from restitch.registry.ledger.line_state import LineState
from restitch.registry.mlflow.projection import Part, model_name


class Description(NamedTuple):
    """A description in Markdown, and the beginning that shows that it is ours."""

    text: str
    opening: str

    def replaces(self, present: str | None) -> bool:
        """True if it differs from the present description, and that is not a user's."""
        return present != self.text and (not present or present.startswith(self.opening))


_EXPERIMENTS: dict[Part, tuple[str, str]] = {
    None: (
        "Merged versions of line {line}",
        "one run for each, with its measurements, recipe and report. The tag `restitch.role` is "
        "`champion`, `former champion`, `candidate`, `superseded` or `rejected`; the filter "
        "`tags.restitch.role != 'rejected'` leaves out what failed its gates.",
    ),
    "audit": (
        "Acts of line {line}",
        "one finished run for each, numbered in order: what happened, who did it, when and why.",
    ),
    "models": (
        "Finetuned models of line {line}",
        "one run for each version of the registered models `{line}.TASK`, with its measurements.",
    ),
    "history": (
        "Charts of line {line}",
        "the run `champions of {line}` shows the versions that were in use, and the run "
        "`rejected versions of {line}` those that failed their gates. The step is the version.",
    ),
    "studies": (
        "Studies of line {line}",
        "comparisons of methods, analyses and specialists. None of them changed the line.",
    ),
}


def of_experiment(line: str, part: Part, store: str) -> Description:
    """The description of an experiment of a line."""
    name, content = (text.format(line=line) for text in _EXPERIMENTS[part])
    about = f"The registered model `{line}` describes the line."
    return Description(f"{name}: {content}\n\n{about}\n\n{_places(line, store)}", name)


def of_model(line_state: LineState, task: str | None, store: str) -> Description:
    """The description of the line's registered model, or of a task's."""
    line, spec = line_state.line, line_state.spec
    if task is None:
        opening = f"The merged model of line {line}"
        methods = " or ".join(one.name for one in spec.method.methods)
        text = (
            f"{opening}: one model with the skills of all its tasks, merged by {methods} from "
            f"models that were finetuned from `{spec.base}` (family {spec.family}). The finetuned "
            f"models of a task are the registered model `{line}.TASK`.\n\nThe alias `champion` is "
            "the version in use. On a pinned line `candidate` is the newest version that passed "
            "its gates. The description of each version gives its values and its outcome."
        )
    else:
        opening = f"The finetuned models of task {task} on line {line}"
        text = (
            f"{opening}, all made from `{spec.base}`. The tag `restitch.state` of a version is "
            "`ready` if it takes part in the merged model, which is the registered model "
            f"`{model_name(line)}`; `restitch.reason` says why one does not."
        )
    return Description(f"{text}\n\n{_places(line, store)}", opening)


def _places(line: str, store: str) -> str:
    return (
        f"**History:** the experiment `{line}.audit` has every act and `{line}.history` the "
        f"charts. `restitch history {line}` shows the same from the store.\n\n"
        f"**Weights:** in the store at `{store}`, by digest. `restitch export {line} champion OUT` "
        "writes the merged model as a Hugging Face folder."
    )
