"""Results as text: a line while they come, and one table at the end."""

from typing import Any


def line(case: str, row: str, passes: str, found: dict[str, Any]) -> str:
    return f"{case:32} {passes:17} {row:42} {cell(found)}"


def cell(found: dict[str, Any]) -> str:
    """A time with all that belongs to it; or why there is none."""
    for reason in ("missing", "failed"):
        if reason in found:
            return f"{reason}: {found[reason]}"
    if "losses" in found:
        apart = ", ".join(f"{name} {value:.2e}" for name, value in found["largest_difference_from_xla"].items())
        ratio = found["kernels_over_spread"]
        return f"largest loss difference from xla: {apart}" + ("" if ratio is None else f" ({ratio:.2f} of the spread)")
    parts = [f"{found['ms']:.4g} ms"]
    if "floor_over_measured" in found:
        parts.append(f"{found['floor_over_measured']:.3f} of the floor")
    if "tokens_per_s" in found:
        parts.append(f"{found['tokens_per_s']:,.0f} tokens/s")
    if "steps_tokens_per_s" in found:
        parts.append(f"steps alone {found['steps_tokens_per_s']:,.0f}")
    if "prompt_ms" in found:
        parts.append(f"prompt {found['prompt_ms']:.4g} ms")
    if "peak_gib" in found:
        parts.append(f"{found['peak_gib']:.2f} GiB")
    if "errors" in found:
        parts.append(f"error {max(found['errors'].values()):.1e}")
    if "timer" in found:
        parts.append(found["timer"])
    return ", ".join(parts)


def entries(whole: dict[str, Any]) -> list[dict[str, Any]]:
    """One per case and pass: name, passes, floor, and its rows, those without figures too; ours come first."""
    found = []
    for name, case in whole["kernels"].items():
        rows = dict(sorted(case["rows"].items(), key=lambda item: not item[0].startswith("ssm_jax")))
        for passes in case["floors"] or ["all"]:
            of_pass = {row: cells.get(passes, cells.get("all")) for row, cells in rows.items()}
            found.append(
                {
                    "name": name,
                    "title": case["title"],
                    "passes": passes,
                    "floor": case["floors"].get(passes),
                    "rows": {row: cell for row, cell in of_pass.items() if cell is not None},
                }
            )
    return found


def times_ours(rows: dict[str, dict[str, Any]], row: str) -> float | None:
    """How many times as long as the fastest of our implementations."""
    ours = [found["ms"] for name, found in rows.items() if name.startswith("ssm_jax") and "ms" in found]
    return rows[row]["ms"] / min(ours) if ours and "ms" in rows[row] else None


def text(whole: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| case | pass | floor ms | row | measured | times our fastest |", "|---|---|---|---|---|---|"]
    for entry in entries(whole):
        floor = entry["floor"]
        least = f"{floor['ms']:.4g} ({floor['bound']})" if floor else ""
        for row, found in entry["rows"].items():
            times = times_ours(entry["rows"], row)
            shown = "" if times is None else f"{times:.2f}"
            lines.append(f"| {entry['name']} | {entry['passes']} | {least} | {row} | {cell(found)} | {shown} |")
    for what, rows in whole["models"].items():
        lines += [f"| {what} | model |  | {row} | {cell(found)} |  |" for row, found in rows.items()]
    return "\n".join(lines)
