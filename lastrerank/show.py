"""What commands print for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# Control characters, which a terminal obeys, and marks that turn the direction of what stands beside them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")

RANDOM_NOTICE = "The weights are random: the order means nothing."


def plain(text: str) -> str:
    """Text without anything that a terminal would take for a command."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def results_table(
    query: str, results: Sequence[Mapping[str, Any]], names: list[str], encoded: Any, explain: bool
) -> Any:
    """A ranking as a rich table."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(plain(query)), title_justify="left")
    table.add_column("rank", justify="right")
    table.add_column("score", justify="right")
    if explain:
        table.add_column("tokens", justify="right")
    table.add_column("document", overflow="fold")
    for place, result in enumerate(results, 1):
        index = result["index"]
        text = result["document"] if isinstance(result["document"], str) else result["document"]["text"]
        cells = [str(place), f"{result['relevance_score']:+.4f}"]
        if explain:
            cells.append(f"{encoded.doc_tokens[index]}{' (cut)' if encoded.cut[index] else ''}")
        table.add_row(*cells, Text(plain(f"[{names[index]}] {' '.join(text[:200].split())[:110]}")))
    return table


def speed_table(rows: list[dict[str, Any]]) -> Any:
    """`lastrerank bench` as a rich table."""
    from rich.table import Table

    table = Table(title=f"{rows[0]['prompt_tokens']} prompt tokens on {rows[0]['device']}", title_justify="left")
    for name in ("backend", "dtype"):
        table.add_column(name)
    for name in ("median ms", "quartiles", "tokens/s", "difference", "tau"):
        table.add_column(name, justify="right")
    for row in rows:
        seconds = row["seconds"]
        table.add_row(
            row["backend"], row["dtype"], f"{1e3 * seconds['median']:.1f}",
            f"{1e3 * seconds['low']:.1f} to {1e3 * seconds['high']:.1f}", f"{row['tokens_per_s']:,.0f}",
            f"{row['max_difference']:.1e}", f"{row['tau']:.3f}",
        )  # fmt: skip
    return table


def report_lines(report: dict[str, Any]) -> list[str]:
    """`lastrerank doctor`."""
    lines = [f"{name:14} {version}" for name, version in report["versions"].items()]
    lines.append(f"{'device':14} {report['device']}")
    lines += [
        f"{'backend':14} {name}: {'available' if reason is None else reason}"
        for name, reason in report["backends"].items()
    ]
    if report["products"] is not None:
        rates = ", ".join(f"{dtype} {rate:.0f} G/s" for dtype, rate in report["products"]["rates"].items())
        lines.append(f"{'products':14} {report['products']['instruction_set']}: {rates}")
    check = report["self_check"]
    said = [f"{name} differs by {found:.1e} from the reference" for name, found in check["difference"].items()]
    said += [f"{name} fails: {reason}" for name, reason in check["failed"].items()]
    lines.append(f"{'self-check':14} {'ok' if check['ok'] else 'FAILED'}: {', '.join(said)}")
    kernels = report["kernels"]
    if kernels is not None and "unchecked" in kernels:
        lines.append(f"{'kernels':14} not checked: {kernels['unchecked']}; \"auto\" takes the reference")
    elif kernels is not None:
        for verdict in [kernels["refused"], kernels] if "refused" in kernels else [kernels]:
            found = "right" if verdict["ok"] else f"REFUSED: {verdict['reason']}"
            lines.append(
                f"{'kernels':14} {verdict['backend']} for the shape of {verdict['model']}: {found} "
                f"({verdict['seconds']:g} s, {verdict['key'][:12]})"
            )
    if "verify" in report:
        result = report["verify"]
        lines.append(f"{'verify':14} {'ok' if result['ok'] else 'FAILED'}: {result['message']}")
    return lines
