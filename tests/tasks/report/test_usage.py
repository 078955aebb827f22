"""The lines of Python in a model card run as they are printed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from restitch.tasks.report.usage import usage
from tests import tiny_models


def text_classifier(folder: Path) -> Path:
    base = tiny_models.tiny_bert(folder.with_name("base"))
    return tiny_models.tiny_classifier(base, folder, ("no", "yes"))


def image_classifier(folder: Path) -> Path:
    base = tiny_models.tiny_image_model(folder.with_name("base"))
    return tiny_models.tiny_classifier(base, folder, ("cat", "dog"))


def encoder_half(folder: Path) -> Path:
    return tiny_models.tiny_t5(folder, encoder=True)


@pytest.mark.parametrize(
    ("family", "make", "classifier"),
    [
        ("causal-lm", tiny_models.tiny_decoder, False),
        ("seq2seq-lm", tiny_models.tiny_seq2seq, False),
        ("masked-lm", tiny_models.tiny_masked, False),
        ("text-encoder", tiny_models.tiny_bert, False),
        ("text-encoder", encoder_half, False),
        ("text-classifier", tiny_models.tiny_bert, False),
        ("text-classifier", text_classifier, True),
        ("image-classifier", tiny_models.tiny_image_model, False),
        ("image-classifier", image_classifier, True),
        ("clip", tiny_models.tiny_clip, False),
    ],
)
def test_the_lines_of_each_family_run_as_printed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    family: str,
    make: Callable[[Path], Path],
    classifier: bool,
) -> None:
    folder = make(tmp_path / "model")
    lines = usage(family, folder, ".", classifier=classifier)
    assert lines is not None
    monkeypatch.chdir(folder)
    exec(compile(lines, "the card", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_a_family_of_another_package_has_no_lines(tmp_path: Path) -> None:
    assert usage("somebody-elses", tmp_path, ".", classifier=False) is None
