"""How far SafeBeam moves each arm from each other decoder, on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.report.contrasts import contrast
from trimtab.report.data import Place
from trimtab.report.panels import ANY, HELDOUT, SEEN, Cells

PLAIN = (HELDOUT, SEEN, ANY)


def steering(
    cells: Cells, families: Sequence[Sequence[str]], places: Sequence[Place], groups: Sequence[str]
) -> list[dict[str, Any]]:
    """How far SafeBeam moves each arm from each other decoder, on the same prompts: a row per arm, model, decoder, group."""
    rows: list[dict[str, Any]] = []
    for beam in (p for p in places if p.kind.startswith("safebeam")):
        here = [p for p in places if (p.panel, p.model) == (beam.panel, beam.model)]
        others = [p for p in here if p.kind and not p.kind.startswith("safebeam")]
        for other in others:
            for group in (g for g in groups if g.startswith(PLAIN)):
                for ids in families:
                    a, b = (cells.values(ids, p.stage, group, "risk_rate") for p in (beam, other))
                    key = f"steering {beam.stage} {other.stage} {group} {ids[0]}"
                    made = contrast([(1.0, a), (-1.0, b)], key=key) if a and b else None
                    if made is not None:
                        rows.append({
                            "arm": ids[0], "panel": beam.panel, "model": beam.model, "decoder": beam.decoder,
                            "from": other.decoder, "group": group, "metric": "risk_rate", **made.plain(),
                        })  # fmt: skip
    return rows
