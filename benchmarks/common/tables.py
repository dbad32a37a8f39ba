"""Tables that more than one command shows, from what their result files hold; the header first."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.statistics import short, shown
from pipelines.files import Row

Table = list[tuple[str, ...]]
DECODE_HEADER = ("size", "threads", "hardware share", "prefetch", "preallocated", "images/s")


def phases(result: Row) -> Table:
    """Return what `benchmarks.throughput` found, a row for each phase."""
    rates = ("loader", "model", "both")
    rows: Table = [("phase", *rates, "stall", "data wait", "FLOP/s", "bytes/s", "memory")]
    for phase in result["phases"]:
        flops, moved = (phase[f"model_{unit}_per_sec"] / 1e9 for unit in ("flops", "bytes"))
        row = [f"{phase['image_size']} px x {phase['batch_size']}"]
        row += [shown(phase[f"{part}_images_per_sec"]) for part in rates]
        row += [shown(phase["stall"], 100, " %"), f"{100 * phase['data_wait_share']['mean']:.1f} %"]
        row += [f"{short(flops)} G, {100 * phase['share_of_matmul']:.0f} %"]
        row += [f"{short(moved)} G, {100 * phase['share_of_copy']:.0f} %"]
        rows.append((*row, gibibytes(phase["rates"]["memory_bytes"])))
    return rows


def decode_row(rate: Row, decoder: str) -> tuple[str, ...]:
    """Format a rate of `benchmarks.research.decode_sweep`; `decoder`: "mixed" or "cpu"."""
    settings = rate["settings"]
    hint = f"{settings['width_hint']} x {settings['height_hint']}"
    return (
        f"{rate['image_size']} px",
        str(rate["threads"]),
        f"{settings['hw_decoder_load']:g}" if decoder == "mixed" else "-",
        str(settings["prefetch"]),
        hint if settings["width_hint"] else "-",
        shown(rate["images_per_sec"]) if rate["images_per_sec"] else rate["error"],
    )


def steps(rates: Sequence[Row]) -> Table:
    """Return rates of `benchmarks.training_step`."""
    header = ("step", "batch", "images/s", "floor", "measured / floor", "GFLOP", "MB", "memory")
    rows: Table = [header]
    for rate in rates:
        floor, measured = rate["floor_images_per_sec"], rate["images_per_sec"]
        row = [f"{rate['image_size']} px {rate['variant']}", str(rate["batch_size"])]
        if floor is None:
            row += [rate["error"], "-", "-"]
        else:
            share = f"{100 * measured['mean'] / floor:.1f} %"
            row += [shown(measured), f"{floor:,.0f}", share]
        row += [f"{rate['flops_per_image'] / 1e9:.1f}", f"{rate['bytes_per_image'] / 1e6:.0f}"]
        rows.append((*row, "-" if rate["error"] else gibibytes(rate["peak_memory_bytes"])))
    return rows


def gibibytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
