"""One self-contained HTML page: styles and pictures inside it, no script, nothing fetched."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING, Any

import yaml

from regimewrap.report.statistics import TIE_RULE
from regimewrap.report.summary import accuracy, bound_share, budget, keep_ratios, percent_spread
from regimewrap.report.tables import accuracy_caption, cycles
from regimewrap.report.words import conclusion

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from regimewrap.report.results import Arm, Experiment

_STYLE = """
:root { color-scheme: light; --ink: #222; --soft: #595959; --line: #ddd; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 48rem; padding: 2rem 1rem 4rem; color: var(--ink); background: #fff;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
.conclusion { font-size: 1.12rem; margin: 1.4rem 0; padding: .2rem 0 .2rem 1rem; border-left: 4px solid var(--accent); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .5rem; }
caption span { display: block; max-width: calc(100vw - 2rem); }
th, td { padding: .4rem .7rem .4rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); }
.figures td, .figures thead th:not(:first-child) { text-align: right; padding: .4rem 0 .4rem .7rem; }
.figures td, .figures tbody th { white-space: nowrap; }
.arms { padding-left: 1.1rem; margin: .8rem 0; }
.settings th { width: 30%; font-weight: 600; }
.settings td { overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
img { display: block; width: 100%; height: auto; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .85rem; line-height: 1.4; }
code { overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .3rem 0; }
"""

_PICTURES = {
    "accuracy-by-budget.png": (
        "Accuracy by budget",
        "Test accuracy after the last epoch over the keep ratio it was evaluated at. Lines join the means; bars reach "
        "one standard deviation over seeds each way; faint dots are single seeds. Arms stand a little apart so that "
        "none hides another.",
    ),
    "keep-ratio-trace.png": (
        "How the budget moved",
        "The keep ratio over training. Triangles mark resets to the full budget, circles relaxations, both where they "
        "were decided. The grey area is the share of sites at which the gate zeroed something: where there is none, "
        "the gate did nothing, whatever the keep ratio. Faint lines are the other seeds.",
    ),
    "time-bound.png": (
        "How often the gate bound",
        "The share of updates, among those looked at, in which the gate zeroed a non-zero unit at one site or more; "
        "mean over seeds. An arm whose gate seldom binds is trained like the dense one.",
    ),
}

_CAVEATS = (
    "Few seeds stand behind each figure. The spread says how far runs differ, not how sure their mean is.",
    TIE_RULE,
    "Accuracy is that of the last epoch, never of the best one, and no run was steered by test figures; but the demo's "
    "default settings were found by trials on the same data.",
    "Small data sets, such as scikit-learn's digits with their 8×8 pixels, are easy: figures on them say little about "
    "others.",
    "The method is Haotian Wang's (<cite>Joint Training Across Multiple Activation Sparsity Regimes</cite>, "
    "arXiv 2603.03131). The gain of about one point reported there comes from one run an arm. Which of the strategies "
    "here is which of the paper's two, and how its figures were picked, is not known to us.",
)


def render(experiment: Experiment, pictures: Mapping[str, bytes]) -> str:
    """Return the page's HTML; ``pictures`` are PNG files by the names ``write_report`` gives them."""
    sections = [
        f"<h1>{escape(experiment.title)}</h1>",
        f'<p class="soft">{escape(experiment.device)} · <code>{escape(experiment.command)}</code></p>',
        f'<p class="conclusion">{_sentence(conclusion(experiment))}</p>',
        _accuracy_table(experiment),
        _arms(experiment),
        *(_figure(name, pictures[name], experiment) for name in _PICTURES if name in pictures),
        "<h2>What to keep in mind</h2>",
        f"<ul>{''.join(f'<li>{caveat}</li>' for caveat in _CAVEATS)}</ul>",
        "<h2>Settings</h2>",
        _settings_table("How it was run", _settings(experiment)),
        "<h2>Policies</h2>",
        *(_policy(arm) for arm in experiment.arms),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(experiment.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _sentence(text: str) -> str:
    return escape(text).replace(" %", "&nbsp;%")


def policy_yaml(arm: Arm) -> str:
    """Return an arm's policy as YAML, fields in the order the policy has them."""
    return yaml.safe_dump(arm.policy, sort_keys=False, allow_unicode=True)


def _accuracy_table(experiment: Experiment) -> str:
    ratios = keep_ratios(experiment)
    head = ["arm", *(budget(ratio) for ratio in ratios), "gate bound", "cycles"]
    rows = []
    for arm in experiment.arms:
        figures = [
            *(percent_spread(accuracy(experiment, arm.name, ratio)) for ratio in ratios),
            percent_spread(bound_share(experiment, arm.name)),
            cycles(experiment, arm.name),
        ]
        name = f'<th scope="row">{escape(arm.name)}</th>'
        rows.append(f"<tr>{name}{_cells(figures)}</tr>")
    caption = f"{accuracy_caption(experiment)}. Gate bound: share of updates, in %, in which it zeroed something."
    headings = "".join(f"<th scope='col'>{escape(text)}</th>" for text in head)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Accuracy table">'
        f'<table class="figures"><caption><span>{escape(caption)}</span></caption>'
        f"<thead><tr>{headings}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _arms(experiment: Experiment) -> str:
    items = "".join(f"<li><b>{escape(arm.name)}</b>: {escape(arm.about)}</li>" for arm in experiment.arms)
    return f'<ul class="arms soft">{items}</ul>'


def _cells(texts: Iterable[str]) -> str:
    return "".join(f"<td>{escape(text)}</td>" for text in texts)


def _figure(name: str, picture: bytes, experiment: Experiment) -> str:
    heading, caption = _PICTURES[name]
    source = base64.b64encode(picture).decode("ascii")
    alt = escape(_ALTERNATIVES[name](experiment))
    return (
        f"<h2>{heading}</h2>\n<figure>"
        f'<img src="data:image/png;base64,{source}" alt="{alt}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _accuracy_in_words(experiment: Experiment) -> str:
    return f"Line chart, figures as in the table above. {conclusion(experiment)}"


def _trace_in_words(experiment: Experiment) -> str:
    told = []
    for arm in experiment.arms:
        for run in [run for run in experiment.runs_of(arm.name) if run.trace][:1]:
            events = [point.event for point in run.trace]
            lowest = min(point.keep_ratio for point in run.trace)
            told.append(
                f"{arm.name}, seed {run.seed}: {events.count('reset')} resets, {events.count('relax')} relaxations, "
                f"lowest keep ratio {lowest:.2g}"
            )
    return f"Keep ratio over optimizer updates, a panel an arm. {'; '.join(told)}."


def _bound_in_words(experiment: Experiment) -> str:
    told = [f"{arm.name} {percent_spread(bound_share(experiment, arm.name))} %" for arm in experiment.arms]
    return f"Bar chart of the share of updates in which the gate bound: {', '.join(told)}."


_ALTERNATIVES = {
    "accuracy-by-budget.png": _accuracy_in_words,
    "keep-ratio-trace.png": _trace_in_words,
    "time-bound.png": _bound_in_words,
}


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
    return f'<table class="settings"><caption><span>{escape(caption)}</span></caption><tbody>{rows}</tbody></table>'


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
