"""Whether the masks of models belong to the line's present settings."""

from restitch.merging.digests import digest_json
from restitch.registry.ledger.finetuned_models import ModelVersion
from restitch.registry.ledger.line_state import LineState
from restitch.registry.specs.line import LineSpec


def mask_choice(spec: LineSpec) -> str:
    """The digest of the settings that choose masks."""
    choice = spec.localize
    tensors = [list(choice.include), list(choice.exclude)]
    runs_model = choice.reads_rows or choice.chooses_by_rows
    compute = [spec.compute] if runs_model and spec.compute != "auto" else []
    return digest_json([choice.mode, choice.settings, tensors, *compute])


def needs_new_mask(line_state: LineState, model: ModelVersion) -> bool:
    """True if a model takes part in merges and needs a new mask."""
    return model.state in ("ready", "held") and has_old_mask(line_state, model)


def has_old_mask(line_state: LineState, model: ModelVersion) -> bool:
    """True if the line's settings for masks have changed since the model was localized."""
    return model.facts.choice not in (None, mask_choice(line_state.spec))
