"""Pictures and the README's figures, from the CSV files in benchmarks/results and nothing else."""

import csv
import re
import statistics
from pathlib import Path

from . import table

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
MARKS = re.compile(r"(<!-- figures -->\n).*?(<!-- end -->)", re.DOTALL)
TITLES = {"forward": "Forward", "training": "Forward and backward"}
ROWS = {
    "forward": "one layer, forward",
    "forward-small": "… of which M ≤ 16, in and out ≤ 1536",
    "training": "one layer, forward and backward",
    **{
        f"merged-training-m{m}": f"MergedLinear 768 → 2304, two of three parts, M = {m}, forward and backward"
        for m in (1, 64, 512)
    },
    **{
        f"mixture-gated-{mode}-{dtype}-m{m}": f"X-LoRA layer 1024 → 1024, 8 experts, r = 16, {dtype}, M = {m}, {text}"
        for mode, text, sizes in (("forward", "forward", (1, 256)), ("training", "forward and backward", (256,)))
        for dtype in ("fp32", "bf16")
        for m in sizes
    },
    "mixture-xlora-forward-fp32-m256": "X-LoRA, Llama of 4 layers and width 512, 8 experts, 256 tokens, forward",
    "mixture-generate-forward-fp32-m256": "… 64 tokens generated after 256 (KV cache; PEFT has none)",
    "embedding-training-m4096": "Embedding 50,000 × 768, 4,096 ids, forward and backward",
    **{
        f"smollm2-decode-{dtype}-b{batch}": f"SmolLM2-135M, decode step, {dtype}, batch {batch}"
        for dtype in ("fp32", "bf16")
        for batch in (1, 4)
    },
}


def main():
    for path in machines():
        rows = table.read(path)
        for mode in TITLES:
            draw_linear(rows, mode, path.with_name(f"{path.stem}-{mode}.png"))
    readme = ROOT / "README.md"
    readme.write_text(readme_with_figures(readme.read_text()))


def machines():
    """The machines' files; what benchmarks.composition writes stands beside them."""
    return [path for path in sorted(RESULTS.glob("*.csv")) if not path.stem.endswith(("-composition", "-serving"))]


def draw_linear(rows, mode, out):
    """A panel for each shape and dtype: time over the plain layer's, against the number of rows of x."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {}
    for row in rows:
        parts = row["case"].split("/")
        if parts[:2] == ["linear", mode]:
            lines = panels.setdefault((parts[3], parts[2]), {})
            lines.setdefault(row["method"], []).append((int(parts[4][1:]), row["vs_base"]))
    if not panels:
        return
    dtypes, shapes = (list(dict.fromkeys(key[i] for key in panels)) for i in (0, 1))
    size = {"figsize": (4.2 * len(shapes), 3.2 * len(dtypes))}
    figure, axes = plt.subplots(len(dtypes), len(shapes), sharey=True, squeeze=False, **size)
    # one colour for a method in every panel, whichever others it stands beside
    methods = list(dict.fromkeys(m for lines in panels.values() for m in lines))
    colour = {m: f"C{i}" for i, m in enumerate(methods)}
    for (dtype, shape), lines in panels.items():
        axis = axes[dtypes.index(dtype)][shapes.index(shape)]
        for method, points in lines.items():
            style = {"linewidth": 2.5} if method == "fastlora" else {"linewidth": 1.2, "alpha": 0.8}
            style |= {"color": colour[method], "label": method, "marker": "o", "markersize": 3}
            axis.plot(*zip(*sorted(points), strict=True), **style)
        axis.set(xscale="log", yscale="log", title=f"{shape.replace('x', ' → ')}, {dtype}", xlabel="rows of x")
        ticks = (0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5)
        axis.set_yticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("time over torch's plain layer")
    handles = {m: h for a in axes.flat for h, m in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="lower center", ncols=len(handles), frameon=False)
    figure.suptitle(f"{TITLES[mode]}, rank 16, {rows[0]['device']}, {rows[0]['threads']} threads")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(out, dpi=110)
    plt.close(figure)


def readme_with_figures(text):
    """The README with its figures replaced by those of the results."""
    blocks = [block(path) for path in machines()]
    return MARKS.sub(lambda m: m[1] + "".join(blocks) + m[2], text)


def block(path):
    """One machine: where, a table, the pictures."""
    rows = table.read(path)
    values = {(r["case"].removeprefix("figure/"), r["method"]): r["value"] for r in rows if r["value"] != ""}
    commits = ", ".join(sorted({r["commit"] for r in rows}))
    lines = [
        f"**{rows[0]['device']}**, {rows[0]['threads']} threads, torch {rows[0]['torch']}, commit {commits}. "
        "Geometric means of ratios of time:",
        "",
        "| | fastlora / plain layer | loralib / fastlora | PEFT / fastlora |",
        "|---|---|---|---|",
    ]
    for name, label in ROWS.items():
        asked = ((f"{name}-over-base", "fastlora"), *((f"{name}-over-fastlora", m) for m in ("loralib", "peft")))
        cells = [f"{values[key]:.2f}" if key in values else "" for key in asked]
        if any(cells):
            lines.append(f"| {label} | {' | '.join(cells)} |")
    worst = values.get(("forward-worst-over-base", "fastlora"))
    if worst is not None:
        lines += ["", f"The slowest of the cells, forward: {worst:.2f} × the plain layer."]
    eight = [
        f"{values[key]:.2f} × (M = {m}, {TITLES[mode].lower()})"
        for mode in TITLES
        for m in (1, 256)
        if (key := (f"tasks-{mode}-m{m}-over-fastlora", "fastlora_8")) in values
    ]
    if eight:
        lines += ["", f"Eight tasks at once, 1024 → 1024 and rank 8 each, take {', '.join(eight)} the time of one."]
    lines += composition(path.with_name(f"{path.stem}-composition.csv"))
    drawn = [mode for mode in TITLES if path.with_name(f"{path.stem}-{mode}.png").exists()]
    pictures = [f"![{TITLES[mode]}](benchmarks/results/{path.stem}-{mode}.png)" for mode in drawn]
    return "\n".join([*lines, "", *pictures, "", ""])


def composition(path):
    """LoraHub's figures, a paragraph of `block`."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    rate = {row["method"]: float(row["candidates_per_s"]) for row in rows if row["case"] == "rate"}
    over = next(float(row["value"]) for row in rows if row["case"].startswith("original over"))
    at = {}
    for row in rows:
        if row["case"] == "objective":
            at.setdefault(row["method"], []).append((float(row["objective"]), float(row["seconds"])))
    middle = {m: [statistics.median(column) for column in zip(*pairs, strict=True)] for m, pairs in at.items()}
    found = "; ".join(f"{m} {objective:.3f} in {seconds:.1f} s" for m, (objective, seconds) in middle.items())
    one, eight = rate["population 1"], rate["population 8"]
    return [
        "",
        "LoraHub with 20 modules of rank 16 on MiniLM and 5 texts of 16 tokens: "
        f"{rate['original']:.0f} candidates a second by the original, {one:.0f} here one at a time, {eight:.0f} eight "
        f"in a forward ({eight / one:.2f} ×). To the objective that the original has after 40 candidates the better "
        f"search takes 1 / {over:.1f} of its time (median of seeds). Median objective and time of each: {found}.",
    ]


if __name__ == "__main__":
    main()
