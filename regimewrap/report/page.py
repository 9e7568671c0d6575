"""One self-contained HTML page: styles, drawings and one small script inside it, nothing fetched."""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING, Any

import yaml

from regimewrap.report.look import SCRIPT, STYLE
from regimewrap.report.statistics import FEWEST_SEEDS, TIE_RULE
from regimewrap.report.summary import (
    accuracy,
    bound_share,
    budget,
    density,
    keep_ratios,
    milliseconds,
    percent_spread,
    reference_arm,
    seed_count,
    written,
)
from regimewrap.report.tables import accuracy_caption, cycles
from regimewrap.report.words import conclusion, opening

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from regimewrap.report.results import Arm, Experiment

# A page that could fetch or send something would say so here.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_HEADINGS = {
    "accuracy-by-budget": "Accuracy by budget",
    "density-by-budget": "Density by budget",
    "milliseconds-by-budget": "Milliseconds by budget",
    "keep-ratio-trace": "How the budget moved",
}


def render(experiment: Experiment, drawings: Mapping[str, str]) -> str:
    """Return the page's HTML; ``drawings`` are those of ``charts``."""
    sections = [
        f"<h1>{escape(experiment.title)}</h1>",
        f'<p class="soft">{escape(experiment.device)} · <code>{escape(experiment.command)}</code></p>',
        f"<p>{_sentence(opening(experiment))}</p>",
        f'<p class="conclusion">{_sentence(conclusion(experiment))}</p>',
        _accuracy_table(experiment),
        _arms(experiment),
        "<section>",  # the slider stays in sight as far as this reaches
        _slider(experiment) if "accuracy-by-budget" in drawings else "",
        *(_figure(name, drawing, experiment) for name, drawing in drawings.items()),
        "</section>",
        "<h2>What to keep in mind</h2>",
        f"<ul>{''.join(f'<li>{caveat}</li>' for caveat in _caveats(experiment))}</ul>",
        "<h2>Settings</h2>",
        _settings_table("How it was run", _settings(experiment)),
        "<h2>Policies</h2>",
        *(_policy(arm) for arm in experiment.arms),
        f"<script>{SCRIPT}</script>" if "accuracy-by-budget" in drawings else "",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(experiment.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


def _caveats(experiment: Experiment) -> Iterator[str]:
    if seed_count(experiment) < FEWEST_SEEDS:
        yield "Few seeds stand behind each figure. The spread says how far runs differ, not how sure their mean is."
    if seed_count(experiment) > 1 and len(experiment.arms) > 1 and reference_arm(experiment) is not None:
        yield TIE_RULE
    yield (
        "Accuracy is that of the last epoch, never of the best one, and no run was steered by test figures; but the "
        "demo's default settings were found by trials on the same data."
    )
    yield (
        "Small data sets, such as scikit-learn's digits with their 8×8 pixels, are easy: figures on them say little "
        "about others."
    )
    yield (
        "The method is Haotian Wang's (<cite>Joint Training Across Multiple Activation Sparsity Regimes</cite>, "
        "arXiv 2603.03131). The gain of about one point reported there comes from one run an arm. Which of the "
        "strategies here is which of the paper's two, and how its figures were picked, is not known to us."
    )


def _captions(experiment: Experiment) -> dict[str, str]:
    """Return what to know about each chart; of what it does not show, nothing is said."""
    several = seed_count(experiment) > 1
    spread = " Bars reach one standard deviation over seeds each way; small marks are single seeds." if several else ""
    moved = [run for arm in experiment.arms for run in experiment.runs_of(arm.name)[:1]]
    events = {point.event for run in moved for point in run.trace}
    marks = [
        each for name, each in (("reset", "triangles mark resets"), ("relax", "circles relaxations")) if name in events
    ]
    return {
        "accuracy-by-budget": "Test accuracy after the last epoch over the keep ratio it was evaluated at; arms stand "
        f"a little apart so that none hides another.{spread}",
        "density-by-budget": "What is not zero behind the gates at that keep ratio: a ReLU is sparse by itself, so the "
        f"density may be well below the keep ratio.{spread}",
        "milliseconds-by-budget": "A forward pass of one sample, on one thread of this machine while others trained: "
        "the least of some calls, with the network served at that budget. Layers skip zeros where that is faster here; "
        f"choosing the units takes time too, more than the zeros save where a network is small.{spread}",
        "keep-ratio-trace": "The keep ratio over training"
        + "".join(f"; {each}" for each in marks)
        + ". The grey area is the share of sites at which the gate zeroed something: where there is none, the gate did "
        "nothing, whatever the keep ratio." + (" Faint lines are the other seeds." if several else ""),
    }


def _slider(experiment: Experiment) -> str:
    """Return the slider over the budgets that were evaluated, from the smallest up; a script shows it."""
    told = [{"ratio": ratio, "words": _at(experiment, ratio)} for ratio in reversed(keep_ratios(experiment))]
    data = json.dumps(told).replace("<", "\\u003c")
    last = len(told) - 1
    return (
        '<div id="budget" hidden><label>Budget'
        f'<input type="range" min="0" max="{last}" step="1" value="{last}"></label><output></output></div>'
        f'<script type="application/json" id="budgets">{data}</script>'
    )


def _at(experiment: Experiment, ratio: str) -> str:
    """Say what is known of each arm at a budget, a line each."""
    lines = [budget(ratio)]
    for arm in experiment.arms:
        found = [(pattern, times, of(experiment, arm.name, ratio)) for pattern, times, of in _FIGURES]
        said = [
            pattern.format(written(each, times, 1 if times > 1 else 2)) for pattern, times, each in found if each.values
        ]
        if said:
            lines.append(f"{arm.name}: {', '.join(said)}")
    return "\n".join(lines)


_FIGURES = (("accuracy {} %", 100.0, accuracy), ("density {} %", 100.0, density), ("{} ms", 1.0, milliseconds))


def _sentence(text: str) -> str:
    return escape(text).replace(" %", "&nbsp;%")


def policy_yaml(arm: Arm) -> str:
    """Return an arm's policy as YAML, fields in the order the policy has them."""
    return yaml.safe_dump(arm.policy, sort_keys=False, allow_unicode=True)


def _accuracy_table(experiment: Experiment) -> str:
    ratios = keep_ratios(experiment)
    cycled = any(run.cycles for run in experiment.runs)
    head = ["arm", *(budget(ratio) for ratio in ratios), "gate bound", *(["cycles"] if cycled else [])]
    rows = []
    for arm in experiment.arms:
        figures = [
            *(percent_spread(accuracy(experiment, arm.name, ratio)) for ratio in ratios),
            percent_spread(bound_share(experiment, arm.name)),
            *([cycles(experiment, arm.name)] if cycled else []),
        ]
        # On a narrow screen each figure stands in a line of its own, after its name.
        cells = [
            f'<td data-name="{escape(name)}">{escape(text)}</td>' for name, text in zip(head[1:], figures, strict=True)
        ]
        rows.append(f'<tr><th scope="row">{escape(arm.name)}</th>{"".join(cells)}</tr>')
    caption = f"{accuracy_caption(experiment)}. Gate bound: share of updates, in %, in which it zeroed something."
    headings = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    return (
        f'<table class="figures"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{headings}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _arms(experiment: Experiment) -> str:
    items = "".join(f"<li><b>{escape(arm.name)}</b>: {escape(arm.about)}</li>" for arm in experiment.arms)
    return f'<ul class="arms soft">{items}</ul>'


def _figure(name: str, drawing: str, experiment: Experiment) -> str:
    caption = _captions(experiment)[name]
    return f"<h2>{_HEADINGS[name]}</h2>\n<figure>{drawing}<figcaption>{caption}</figcaption></figure>"


def _settings(experiment: Experiment) -> dict[str, Any]:
    versions = ", ".join(f"{name} {version}" for name, version in experiment.versions.items())
    seeds = sorted({run.seed for run in experiment.runs})
    seconds = sum(run.train_seconds for run in experiment.runs)
    return {
        "command": experiment.command,
        "device": experiment.device,
        "versions": versions,
        "seeds": ", ".join(map(str, seeds)),
        "training time, all runs": f"{seconds:.0f} s",
        **experiment.settings,
    }


def _settings_table(caption: str, settings: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name).replace("_", " "))}</th><td>{escape(_text(value))}</td></tr>'
        for name, value in settings.items()
    )
    return f'<table class="settings"><caption>{escape(caption)}</caption><tbody>{rows}</tbody></table>'


def _text(value: Any) -> str:
    match value:
        case dict():
            return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
        case list() | tuple():
            return ", ".join(_text(item) for item in value)
        case float():
            return f"{value:g}"
    return str(value)


def _policy(arm: Arm) -> str:
    return f"<details><summary>{escape(arm.name)}</summary><pre>{escape(policy_yaml(arm))}</pre></details>"
