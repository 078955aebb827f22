"""Compare generated texts with the right answers, for `metric: exact_match`.

A row may have several right answers: a text that is any of them is right.

The steps are those of lm-eval's filter `regex` and metric `exact_match`, in its order. White space
around a text never counts.
"""

import re
import string

from restitch.registry.specs.head import GenerateSpec

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def is_match(text: str, answer: str, spec: GenerateSpec) -> bool:
    """True if a generated text is the answer.

    Args:
        text: the generated text; wrong if nothing can be extracted from it.
        answer: the right one; compared as it is if nothing can be extracted from it.
        spec: what is extracted from both, and what does not count.
    """
    part = text if spec.extract is None else _extracted(text, spec)
    return part is not None and without_ignored(part, spec) == right_text(answer, spec)


def right_text(answer: str, spec: GenerateSpec) -> str:
    """The text with which generated ones are compared."""
    part = None if spec.extract is None else _extracted(answer, spec)
    return without_ignored(answer if part is None else part, spec)


def without_ignored(text: str, spec: GenerateSpec) -> str:
    """A text without all that does not count."""
    for pattern in spec.ignore or ():
        text = re.sub(pattern, "", text)
    if spec.ignore_case:
        text = text.lower()
    if spec.ignore_punctuation:
        text = text.translate(_PUNCTUATION)
    return text.strip()


def _extracted(text: str, spec: GenerateSpec) -> str | None:
    """What the pattern of a task finds: its first group with text, or else all of it."""
    found = list(re.finditer(spec.extract or "", text))
    if not found:
        return None
    match = found[-1 if spec.extract_last else 0]
    return next(filter(None, match.groups()), "") if match.re.groups else match[0]
