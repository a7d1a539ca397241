"""The page that ``report.py`` fills in: markup, style and script, nothing loaded from elsewhere."""

from string import Template

PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="muted">$subtitle</p>
</header>
<main>
<section class="cards" aria-label="Mean figures">$cards</section>
<section class="panel">
<div class="bar">
<h2>Categories</h2>
<input id="filter" type="search" placeholder="Filter categories" aria-label="Filter categories">
<span id="shown" class="muted" aria-live="polite"></span>
</div>
<div class="scroll">$table</div>
</section>
$legend
$categories
</main>
<footer class="panel">
<h2>This run</h2>
<dl>$details</dl>
</footer>
<script>$script</script>
</body>
</html>
"""
)

STYLE = """
:root {
  --page: #f4f5f7; --panel: #fff; --text: #1a1f27; --muted: #667080; --line: #e1e5ea; --bar: #a9c4f7;
  --good: #2f7bd9; --bad: #e0522d; --accent: #2f6fed; --shadow: 0 1px 2px #0001, 0 4px 16px #0000000a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0e1116; --panel: #171b22; --text: #e7ebf0; --muted: #939dab; --line: #2a303a; --bar: #3a5b96;
    --good: #5ba3f5; --bad: #ff7a55; --accent: #7aa7ff; --shadow: none;
  }
}
* { box-sizing: border-box }
body {
  margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 3rem) 3rem; max-width: 1480px; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; letter-spacing: -.02em }
h2 { font-size: 1.1rem; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere }
p { margin: .25rem 0 0 }
.muted { color: var(--muted) }
.panel, .card {
  background: var(--panel); border: 1px solid var(--line); border-radius: 12px; box-shadow: var(--shadow);
}
.panel { padding: 1.1rem 1.25rem 1.25rem; margin-top: 1.25rem }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: .9rem; margin-top: 1.5rem }
.card { padding: .85rem 1rem .8rem }
.card .name { color: var(--muted); font-size: .85rem }
.card .value { font-size: 1.9rem; font-weight: 650; letter-spacing: -.03em; line-height: 1.25 }
.card .value small { font-size: 1rem; font-weight: 500; color: var(--muted) }
.card svg { display: block; width: 100%; height: 14px; margin: .25rem 0 }
.card .least { color: var(--muted); font-size: .78rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.bar { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1rem; margin-bottom: .8rem }
input[type=search] {
  font: inherit; color: inherit; background: var(--page); border: 1px solid var(--line); border-radius: 8px;
  padding: .35rem .7rem; width: min(20rem, 100%);
}
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px }
.scroll { overflow: auto; max-height: 34rem; border: 1px solid var(--line); border-radius: 8px }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .38rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--panel) }
thead th { position: sticky; top: 0; background: var(--panel); padding: 0 }
thead th:first-child { z-index: 1 }
thead button {
  all: unset; box-sizing: border-box; width: 100%; padding: .5rem .75rem; font-weight: 600; cursor: pointer;
  text-align: inherit;
}
thead button:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px }
thead button::after { content: "\\2195"; opacity: .3; margin-left: .35em }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1 }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1 }
tbody tr:hover, tbody tr:hover td:first-child { background: color-mix(in srgb, var(--accent) 8%, var(--panel)) }
td[style] { background: linear-gradient(var(--bar), var(--bar)) left bottom / var(--v) 3px no-repeat }
tfoot td {
  position: sticky; bottom: 0; background: var(--panel); font-weight: 650; border-top: 1px solid var(--line);
  border-bottom: 0;
}
a { color: inherit; text-decoration: none }
td a:hover { color: var(--accent); text-decoration: underline }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; margin: 1.5rem .2rem 0; font-size: .85rem }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 3px; margin-right: .4em; translate: 0 .05em }
.ramp { width: 5.5em }
.category { content-visibility: auto; contain-intrinsic-size: auto 24rem; scroll-margin-top: 1rem }
.facts { display: flex; flex-wrap: wrap; flex-basis: 100%; gap: .2rem 1.3rem; font-size: .88rem }
.facts b { color: var(--text); font-weight: 600; font-variant-numeric: tabular-nums }
.body { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, $width), 1fr)); gap: 1.1rem 1.4rem }
.histogram svg { width: 100%; height: auto; display: block }
figure { margin: 0; min-width: 0 }
figcaption {
  font-size: .82rem; margin-top: .35rem; color: var(--muted); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap;
}
.pictures { display: grid; grid-template-columns: repeat(3, 1fr); gap: 4px }
.pictures.one { grid-template-columns: 1fr; max-width: 33.3% }
.pictures img, .none { width: 100%; aspect-ratio: 1; border-radius: 6px; display: block; background: var(--page) }
.none { display: grid; place-items: center; color: var(--muted); font-size: .75rem; text-align: center; padding: .3rem }
.tag {
  border-radius: 99px; padding: .05rem .55rem; margin-right: .4rem; font-weight: 600; color: var(--panel);
  background: var(--bad);
}
.tag.good { background: var(--good) }
.score { color: var(--text); font-weight: 600; font-variant-numeric: tabular-nums }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.5rem; margin: .8rem 0 0 }
dt { color: var(--muted) }
dd { margin: 0; font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere }
[hidden] { display: none !important }
@media print { .scroll { max-height: none } .category { break-inside: avoid; content-visibility: visible } }
"""

SCRIPT = """
const body = document.querySelector("tbody"), rows = [...body.rows];
const value = (row, i) => { const v = row.cells[i].dataset.value; return v === undefined ? NaN : Number(v) };
document.querySelectorAll("thead th").forEach((head, i, heads) => head.firstChild.addEventListener("click", () => {
  const down = head.ariaSort !== "descending" && (i > 0 || head.ariaSort === "ascending");
  heads.forEach(h => h.ariaSort = null);
  head.ariaSort = down ? "descending" : "ascending";
  rows.sort((a, b) => {
    if (i === 0) return (down ? -1 : 1) * (a.dataset.place - b.dataset.place);
    const x = value(a, i), y = value(b, i);
    if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);  // what has no figure comes last either way
    return down ? y - x : x - y;
  });
  body.append(...rows);
}));
const shown = document.getElementById("shown");
document.getElementById("filter").addEventListener("input", event => {
  const wanted = event.target.value.trim().toLowerCase();
  let n = 0;
  for (const row of rows) {
    const fits = row.cells[0].textContent.toLowerCase().includes(wanted);
    row.hidden = !fits;
    n += fits;
    document.getElementById("c" + row.dataset.place).hidden = !fits;
  }
  shown.textContent = wanted ? n + " of " + rows.length : "";
});
"""
