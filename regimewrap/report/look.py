"""How a page looks and moves: its style sheet and its one script, which fetch nothing."""

from __future__ import annotations

from regimewrap.report.svg import STYLE as CHART_STYLE

STYLE = (
    CHART_STYLE
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 46rem; padding: 2rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
p.soft, .arms, figcaption, caption { color: var(--soft); font-size: .9rem; }
.conclusion { font-size: 1.12rem; margin: 1.4rem 0; padding: .2rem 0 .2rem 1rem; border-left: 4px solid var(--arm1); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .5rem; }
th, td { padding: .4rem .7rem .4rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); }
.figures td, .figures thead th:not(:first-child) { text-align: right; padding: .4rem 0 .4rem .7rem; }
.figures td, .figures tbody th { white-space: nowrap; }
.arms { padding-left: 1.1rem; margin: .8rem 0; }
.settings th { width: 30%; font-weight: 600; }
.settings td { overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
.chart { display: block; width: 100%; max-width: 34rem; height: auto; }
#budget { position: sticky; top: .5rem; background: var(--paper); margin: 2rem 0 0;
  padding: .8rem 1rem; border: 1px solid var(--line); border-radius: .4rem; }
#budget input { display: block; width: 100%; max-width: 30rem; margin: .4rem 0; accent-color: var(--arm1); }
#budget output { white-space: pre-line; font-variant-numeric: tabular-nums; }
pre { border: 1px solid var(--line); padding: .8rem; overflow-x: auto; font-size: .85rem; line-height: 1.4; }
code { overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .3rem 0; }
@media (max-width: 40rem) {
  .figures thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .figures caption, .figures tbody, .figures tr, .figures th { display: block; }
  .figures tbody th { border: 0; padding: .8rem 0 0; }
  .figures td { display: flex; justify-content: space-between; padding: .2rem 0; }
  .figures td::before { content: attr(data-name); color: var(--soft); }
}
@media print {
  body { max-width: none; padding: 0; }
  #budget, .cursor { display: none; }
  figure, tr, li { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""
)

#: Moves the cursor of each chart to the budget that the slider is at, and says the figures there.
SCRIPT = """
const budgets = JSON.parse(document.getElementById("budgets").textContent);
const box = document.getElementById("budget");
const slider = box.querySelector("input"), said = box.querySelector("output");
const charts = [...document.querySelectorAll("svg[data-x]")];
function move() {
  const at = budgets[slider.value];
  said.textContent = at.words;
  slider.setAttribute("aria-valuetext", at.words);
  for (const chart of charts) {
    const cursor = chart.querySelector(".cursor");
    cursor.setAttribute("transform", "translate(" + JSON.parse(chart.dataset.x)[at.ratio] + " 0)");
    cursor.setAttribute("visibility", "visible");
  }
}
slider.addEventListener("input", move);
box.hidden = false;
move();
"""
