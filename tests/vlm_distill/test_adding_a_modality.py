"""docs/ADDING_A_MODALITY.md names files and symbols; they must be there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "ADDING_A_MODALITY.md").read_text(encoding="utf-8")
SOURCES = "\n".join(
    path.read_text(encoding="utf-8")
    for package in ("shared", "vlm_distill", "text_distill")
    for path in sorted((ROOT / package).rglob("*.py"))
)
NOT_OURS = {"input_ids", "audio_distill"}  # of transformers, and of the example


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"`([\w./]+/[\w.]+\.(?:py|md|toml))`", TEXT)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_symbol_that_is_named_exists() -> None:
    named = set(re.findall(r"`(\w+)`", TEXT)) - NOT_OURS
    assert len(named) > 20
    assert [name for name in sorted(named) if not re.search(rf"\b{name}\b", SOURCES)] == []


def test_the_protocol_s_parts_are_all_there() -> None:
    import tomllib

    from shared.adapter import ENTRY_POINT_GROUP, Adapter, AdapterKind
    from text_distill.adapter import TextAdapter, TextAdapterKind
    from vlm_distill.adapter import VlmAdapter, VlmAdapterKind

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["entry-points"][ENTRY_POINT_GROUP]) == {"text", "vlm"} and ENTRY_POINT_GROUP in TEXT
    for protocol, ours in (
        (Adapter, (TextAdapter, VlmAdapter)),
        (AdapterKind, (TextAdapterKind, VlmAdapterKind)),
    ):
        methods = [name for name, value in vars(protocol).items() if callable(value) and name[0] != "_"]
        assert methods and all(hasattr(one, name) for one in ours for name in methods)
