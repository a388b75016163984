"""The sections of docs/results.md about text, from docs/figures/text.json and ablations.json; used by results.py."""

from __future__ import annotations

import shlex

from benchmarks.text import OWN_WEIGHTS
from prism_pipelines.evaluation.calibration import calibration_table
from prism_pipelines.evaluation.tables import markdown_table

MEASURES = {
    "ngram_js": "Distance of character 4-grams to the held-out plays (lower is better)",
    "word_js": "Distance of words to the held-out plays (lower is better)",
    "nll": "6-gram judge, nats per byte (nearest to held-out text is best; low alone is no merit)",
    "known_words": "Share of known words",
    "entropy": "Entropy of the words of a text, nats",
    "distinct_2": "Different word pairs over all",
    "self_bleu": "Self-BLEU (lower is more varied)",
}
KNOBS = ("eta", "remask_strength", "remask_threshold", "threshold", "noise")  # `threshold` in older tables
# Of the tables that were not made anew with the model of 2026-11-26
EARLIER = "Measured on the text model that shipped before (2,800 steps of 32 texts and 400 of 16)."
# As others reported them; nothing here was measured by this project.
PUBLISHED = """## The paper's own figures (theirs, not measured here)

The tables of the paper (arXiv 2510.01384) could not be read where this page was written. A public index lists these
figures for it (wizwand.com, page "Fine-Tuning Masked Diffusion for Provable Self-Correction", read 2026-11-24). It
does not say which row of the paper they are, nor at how many forwards:

| benchmark, as listed there | figure |
| --- | --- |
| unconditional generation, OpenWebText, L = 1024, held-out | MAUVE 0.527 |
| unconditional text generation, OpenWebText | generative perplexity 15.3 |
| code, MBPP | pass@1 32.3 % |
| code, HumanEval | pass@1 42.7 % |

None of it can be compared with the tables above: other models, other data, other lengths. No figure of theirs for
Sudoku was found, so none is given.
"""


def value(row: dict) -> str:
    """A figure with its interval."""
    if row["low"] is None:
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} ({row['low']:.3f}-{row['high']:.3f})"


def intervals(rows: list[dict]) -> str:
    """What the intervals of a table are."""
    kinds = {row["metric"]: row["interval"] for row in rows}
    names = {"bootstrap": "bootstrap", "t": "Student's t"}
    return (
        f"95 % intervals: {names[kinds['entropy']]} over texts for entropy and the judge, "
        f"{names[kinds['ngram_js']]} over seeds for the other measures (none for one seed)."
    )


def grid(rows: list[dict], metric: str, held_out: dict | None = None) -> str:
    """A table of arms by forwards for one measure; "-" where an arm was not run."""
    found = {(row["arm"], row["forwards"]): row for row in rows if row["metric"] == metric}
    arms, forwards = list(dict.fromkeys(arm for arm, _ in found)), sorted({steps for _, steps in found})
    cells = {key: value(row) for key, row in found.items()}
    rows = [[arm, *(cells.get((arm, steps), "-") for steps in forwards)] for arm in arms]
    if held_out is not None:
        rows.append(["a held-out play", value(held_out), *[""] * (len(forwards) - 1)])
    return markdown_table(["forwards", *forwards], rows)


def verdict(table: dict) -> str:
    """Where PRISM beats each other arm: paired interval of the distance above 0, and entropy not lower."""
    pairs = {(pair["arm"], pair["forwards"], pair["metric"]): pair for pair in table["pairs"]}
    arms = list(dict.fromkeys(arm for arm, _, _ in pairs))
    forwards = sorted({steps for _, steps, _ in pairs})
    rows = []
    for arm in arms:
        cells = [arm]
        for steps in forwards:
            if (arm, steps, "ngram_js") not in pairs:
                cells.append("-")
                continue
            distance, entropy = pairs[arm, steps, "ngram_js"], pairs[arm, steps, "entropy"]
            if distance["low"] is None:
                cells.append("one seed")
                continue
            closer = "closer" if distance["low"] > 0 else "farther" if distance["high"] < 0 else "even"
            varied = "lower" if entropy["low"] > 0 else "higher" if entropy["high"] < 0 else "even"
            cells.append(f"{closer}, entropy {varied}")
        rows.append(cells)
    return markdown_table(["PRISM against", *forwards], rows)


def command(table: dict, name: str, whole: dict) -> str:
    """How a table of benchmarks/text.py was made.

    Args:
        table: with some arms of `whole`.
        name: of its file in docs/figures, without ".json".
        whole: the table with all arms.
    """
    settings, arms = table["settings"], [arm["name"] for arm in table["arms"]]
    flags = [
        f"--{flag} runs/text-{'mdm' if flag == 'base' else flag}" for flag, arm in OWN_WEIGHTS.items() if arm in arms
    ]
    flags += [] if len(arms) == len(whole["arms"]) else [f"--arms {shlex.join(arms)}"]
    flags += [f"--num-samples {settings['num_samples']}", f"--seeds {len(table['seeds'])}"]
    flags += [f"--forwards {' '.join(map(str, sorted({row['forwards'] for row in table['rows']})))}"]
    flags += [f"--dtype {settings['dtype']}", f"--table docs/figures/{name}.json"]
    return (
        f"`python -m benchmarks.text {' '.join(flags)}` (commit `{table['commit']}`, {table['device']}, torch "
        f"{table['versions']['torch']})"
    )


def merged(named: dict[str, dict]) -> dict:
    """Tables of the same text and seeds at other numbers of forwards, as one; the later may lack arms of the first.

    Args:
        named: {name of the file, without ".json": table}.
    Raises:
        ValueError: they differ in more than that and the format of the numbers, or share a number of forwards.
    """
    tables = list(named.values())
    first, forwards = tables[0], [steps for table in tables for steps in {row["forwards"] for row in table["rows"]}]
    if len(set(forwards)) < len(forwards):
        raise ValueError(f"The tables of text hold the same numbers of forwards: {sorted(forwards)}.")
    for table in tables[1:]:
        same = [table[name] == first[name] for name in ("seeds", "temperature")]
        same.append(all(arm in first["arms"] for arm in table["arms"]))
        same += [table["settings"][name] == first["settings"][name] for name in ("num_samples", "length", "data")]
        if not all(same):
            raise ValueError("The tables of text differ in arms, seeds or data: make them anew with the same ones.")
    whole = {name: [row for table in tables for row in table[name]] for name in ("rows", "pairs")}
    return first | whole | {"commands": [command(table, name, first) for name, table in named.items()]}


def knobs(table: dict) -> str:
    """The settings of the arms that were chosen."""
    parts = []
    for arm in table["arms"]:
        shown = {k: v for k, v in arm.items() if k in (*KNOBS, "loop_steps", "loop_num_remask")}
        if shown:
            parts.append(f"{arm['name']} " + ", ".join(f"{name} {setting:g}" for name, setting in shown.items()))
    return "; ".join(parts)


def text_section(table: dict) -> str:
    """What was held fixed, the settings chosen, a table for each measure, and the verdict; of what `merged` gives."""
    lines = [
        "## Text",
        "",
        f"{', '.join(table['commands'])}: texts of {table['settings']['length']} bytes. [The model and what is held "
        "fixed](text.md). Temperature 1; forwards of loops and critics are part of the number. "
        f"{intervals(table['rows'])}",
        "",
        "Every rule's knob was chosen on another play from four values (a loop and the head alone have PRISM's): "
        + f"{knobs(table)}. P2 writes in confidence order, as published, the others in random order: its rows show "
        "both.",
        "",
        'Paired by seed, by character 4-grams and by entropy ("closer": nearer to held-out text, interval of the '
        'difference above 0; "even": the interval holds 0):',
        "",
        verdict(table),
        "",
        "![four measures against forwards](figures/text.png)",
        "",
    ]
    held_out = {row["metric"]: row for row in table["held_out"]}
    for metric, title in MEASURES.items():
        lines += [f"### {title}", "", grid(table["rows"], metric, held_out.get(metric)), ""]
    return "\n".join(lines)


def ranking_section(table: dict) -> str:
    """Which tokens head and backbone put last, against the leave-one-out probability."""
    settings, rows = table["settings"], {(r["texts"], r["score"], r["metric"]): r for r in table["rows"]}
    lowest, titles = settings["lowest"], {"head": "quality head", "visible": "backbone, token visible"}
    lines = [
        "### Which bytes come last",
        "",
        f"`python -m benchmarks.text_ranking --num-texts {settings['num_texts']}` (commit `{table['commit']}`, "
        f"{table['device']}, torch {table['versions']['torch']}): scores against the backbone's own probability of a "
        f"byte with that byte masked, by rank correlation over all visible bytes, and by the {lowest} bytes put last, "
        f"which are what remasking reads: how many are among the {lowest} least likely, and their mean log probability "
        "(lower is better). Bootstrap over texts.",
        "",
    ]
    shown = []
    for texts in dict.fromkeys(row["texts"] for row in table["rows"]):
        bounds = [f"{rows[texts, name, 'log_probability']['value']:.2f}" for name in ("all", "exact")]
        for score, title in titles.items():
            cells = [value(rows[texts, score, metric]) for metric in ("rank_correlation", "among_least")]
            cells.append(interval_of(rows[texts, score, "log_probability"]))
            shown.append([texts, title, *cells, " / ".join(bounds)])
    header = ["texts", "score", "rank correlation", f"of {lowest} last", "log probability of these", "of all / least"]
    return "\n".join([*lines, markdown_table(header, shown), ""])


def interval_of(row: dict) -> str:
    """A figure that may be negative, with its interval."""
    if row["low"] is None:
        return f"{row['value']:.2f}"
    return f"{row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def card_section(metrics: dict) -> str:
    """What `make train-text` measured for the bundled model: settings tried on one play, four rules on the others."""
    losses = metrics["held_out_loss"]
    lines = [
        "## Text: the bundled model",
        "",
        "`make train-text` ([recipe](text.md)); from `prism_pipelines/bundled/text/metrics.json`, "
        f"{metrics['dtype']}, {metrics['num_samples']} texts of 256 bytes a figure, temperature 1.",
        "",
        f"Masked diffusion loss on held-out text, nats per byte: {losses['before']:.3f} before the fine-tuning, "
        f"{losses['after']:.3f} after it.",
        "",
        "### Is a planted byte right?",
        "",
        'Remasking ranks the bytes of one text, so the rows of one mask ratio count; "all" also rewards knowing how '
        "much is masked.",
        "",
        calibration_table(metrics["calibration"]),
        "### Settings tried on the validation play, 32 forwards",
        "",
    ]
    tried = []
    for row in metrics["settings_tried"]:
        knob = next(name for name in KNOBS if name in row)
        measures = [f"{row[name]:.3f}" for name in ("ngram_js", "known_words", "entropy")]
        tried.append([row["name"], f"{knob} {row[knob]:g}", *measures])
    header = ["rule", "setting", "distance of character 4-grams", "known words", "entropy of words"]
    lines.append(markdown_table(header, tried))
    seeds = len(metrics["test"]["seeds"])
    lines += ["", "Known words here: those of the play; in all other tables those of the training text.", ""]
    lines += [f"### Four rules at their best setting, other plays, {seeds} seeds", ""]
    for metric in ("ngram_js", "known_words", "entropy"):
        lines += [f"{MEASURES[metric]}:", "", grid(metrics["test"]["rows"], metric), ""]
    lines += ["Difference from MDLM, paired by seed, in distance of character 4-grams (above 0 is worse):", ""]
    for pair in metrics["test"]["pairs"]:
        if pair["metric"] == "ngram_js":
            span = "one seed" if pair["low"] is None else f"{pair['low']:+.4f} to {pair['high']:+.4f}"
            lines.append(f"* {pair['arm']}, {pair['forwards']} forwards: {pair['difference']:+.4f} ({span})")
    lines += ["", "[What this says and what was tried](text.md#what-came-out).", ""]
    return "\n".join(lines)


def loop_sentence(table: dict) -> str:
    """What the loop did to diversity."""
    rows = {(row["arm"], row["forwards"], row["metric"]): row["value"] for row in table["rows"]}
    parts = []
    for steps in sorted({row["forwards"] for row in table["rows"]}):
        if ("PRISM + loop", steps, "distinct_2") in rows:
            changes = [
                f"{name} {rows['PRISM + loop', steps, metric] - rows['PRISM', steps, metric]:+.3f}"
                for metric, name in (("distinct_2", "distinct-2"), ("entropy", "entropy"), ("ngram_js", "distance"))
            ]
            parts.append(f"{steps} forwards: " + ", ".join(changes))
    return "The loop against PRISM alone at equal forwards: " + "; ".join(parts) + ".\n"


def ablation_section(table: dict) -> str:
    """Fine-tunes that differ in one choice, and sampling that differs in one setting."""
    settings, sampling = table["settings"], table["sampling"]
    forwards = " ".join(map(str, sorted({row["forwards"] for row in sampling["rows"]})))
    lines = [
        "## Ablations on the text model",
        "",
        EARLIER,
        f"`python -m benchmarks.ablations --num-samples {settings['num_samples']} --seeds {len(sampling['seeds'])} "
        f"--forwards {forwards} --dtype {settings['dtype']}`, commit `{table['commit']}`, {table['device']}: texts of "
        f"{settings['length']} bytes, compared with other plays than the settings were chosen on. "
        f"{intervals(sampling['rows'])} Fewer texts than above, so distances are larger.",
        "",
    ]
    if "training" in table:
        lines += fine_tunes(table["training"], table["commit"])
    lines += [f"Sampling with that model, eta {settings['eta']:g}, one setting changed:", ""]
    for metric in ("ngram_js", "nll", "entropy", "distinct_2"):
        lines += [f"{MEASURES[metric]}:", "", grid(sampling["rows"], metric), ""]
    return "\n".join(lines)


def fine_tunes(found: dict, commit: str) -> list[str]:
    """The table of fine-tunes; `commit` is that of the page's other tables."""
    values = {(row["arm"], row["metric"]): row for row in found["rows"]}
    made_at = "" if found.get("commit", commit) == commit else f" (commit `{found['commit']}`)"
    lines = [
        f"Fine-tunes of {found['steps']} steps (`--steps {found['steps']} --base runs/{found['base']}`){made_at}, each "
        "different from the first in what its name says; far shorter than the fine-tuning of that model, so they say "
        f"something of each other only. Texts at {found['rows'][0]['forwards']} forwards. AUROC and Brier score: of "
        "the head, 16 tokens planted a text.",
        "",
    ]
    rows = []
    for name in dict.fromkeys(row["arm"] for row in found["rows"]):
        head = found["heads"].get(name)
        cells = ["-"] * 3
        if head is not None:
            cells = [f"{head['auroc']:.3f}", f"{head['brier']:.4f}", f"{head['eval_loss_mdm']:.3f}"]
        cells += [value(values[name, metric]) for metric in ("ngram_js", "nll", "known_words", "entropy")]
        rows.append([name, *cells])
    header = ["fine-tune", "AUROC", "Brier", "held-out loss", "distance", "judge", "known words", "entropy"]
    return [*lines, markdown_table(header, rows), ""]
