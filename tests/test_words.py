"""Plain English: phrases that made this project hard to read do not come back.

CONTRIBUTING.md has the style guide. If a phrase is right in one place, list the file in `RIGHT`.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A phrase, and what to write instead.
PHRASES = {
    r"what it took": "the cost, the seconds",
    r"whoever|whomever": "anyone who, people who",
    r"whatever": "any, everything that",
    r"anew": "again",
    r"beside(?! the point)": "next to, in addition to, outside of",
    r"(?:is|are|was|were) (?:told|said)\b(?! to)": "warns, reports, prints, names",
    r"became of|becomes of": "the outcome, the state",
    r"otherwise than": "differs from",
    r"by lot": "at random",
    r"for (?:who|whom) (?:does|do|is|are|has|have)": "for people who",
}
# Legitimate uses, by phrase: the file.
RIGHT: dict[str, set[str]] = {
    r"whoever|whomever": {"merging/methods/wudi.py"},  # the title of its paper
}
TEXTS = ("*.md", "docs/**/*.md", "deployments/*.md", "examples/**/*.yaml")
CODE = (
    "flows",
    "restitch",
    "merging",
    "modeling",
    "tasks",
    "deployments",
    "cli",
    "registry",
    "serving",
    "benchmarks",
    "playground",
)


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """The texts and the code of the product, by the path from the root."""
    files = [file for pattern in TEXTS for file in ROOT.glob(pattern)]
    files += [file for folder in CODE for file in (ROOT / folder).rglob("*.py")]
    return {str(f.relative_to(ROOT)): f.read_text(encoding="utf-8") for f in sorted(files)}


def offenders(phrase: str, texts: dict[str, str]) -> list[str]:
    """Each line with the phrase, as `file:line: text`."""
    pattern = re.compile(rf"\b(?:{phrase})\b", re.IGNORECASE)
    result = []
    for name, text in texts.items():
        if any(name == right or name.startswith(f"{right}/") for right in RIGHT.get(phrase, ())):
            continue
        if not pattern.search(text):
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                result.append(f"{name}:{number}: {line.strip()[:100]}")
    return result


@pytest.mark.parametrize("phrase", PHRASES)
def test_no_file_uses_the_phrase(phrase: str, texts: dict[str, str]) -> None:
    result = offenders(phrase, texts)
    assert not result, f"write {PHRASES[phrase]!r} instead:\n" + "\n".join(result)
