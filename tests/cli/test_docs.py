"""docs/command-line.md names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from aiockpt.cli import compare, contents, diff, inspect, listing, main, rm, verify
from aiockpt.interchange.exporting import Exported
from aiockpt.interchange.importing import Imported
from tests.support import ROOT

PAGE = (ROOT / "docs" / "command-line.md").read_text()

SHAPES: dict[str, tuple[type[msgspec.Struct], ...]] = {
    "ls": (listing.Listing, listing.Checkpoint, listing.Damaged, listing.Bad),
    "inspect": (inspect.Inspection, inspect.File, contents.Tensor, contents.Value),
    "diff": (diff.Report, compare.Difference, compare.Form, compare.FormChange, compare.ValueChange),
    "verify": (verify.Report, verify.Verdict),
    "rm": (rm.Removed,),
    "export": (Exported,),
    "import": (Imported,),
}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_field_of_the_json_is_named(name: str) -> None:
    """And nothing that is none."""
    (row,) = re.findall(rf"^\| `{name}` \| (.*) \|$", PAGE, re.MULTILINE)
    named = set(re.findall(r"`([a-z_]+)`", row))
    assert named == {field for shape in SHAPES[name] for field in shape.__struct_fields__}


def test_every_command_is_named() -> None:
    """In the table at the top."""
    table = PAGE[: PAGE.index("## ls")]
    for command in main._COMMANDS:
        assert re.search(rf"^\| (\[`{command} |`{command}`)", table, re.MULTILINE), command


def test_links_lead_somewhere() -> None:
    """To headings of this page, and to files."""
    headings = {
        re.sub(r"[^a-z -]", "", line.lower()).replace(" ", "-")
        for line in re.findall(r"^##? (.*)$", PAGE, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]*)\)", PAGE):
        if target.startswith("#"):
            assert target[1:] in headings
        elif not target.startswith("https:"):
            assert (Path(ROOT) / "docs" / target).exists(), target
