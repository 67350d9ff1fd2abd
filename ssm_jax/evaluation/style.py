"""The style sheet of a report: light and dark, from one set of variables."""

CSS = """
:root{color-scheme:light dark;--paper:#fcfcfa;--card:#fff;--ink:#1d2430;--soft:#5d6675;--faint:#e5e5e0;--a:#2f5fd0;--b:#c8551b;
--c:#2a8a5f;--d:#8a3fb0;--e:#a07a10;--f:#c02d5a;--code:#f4f4f0}
@media (prefers-color-scheme:dark){:root{--paper:#14171c;--card:#1b1f26;--ink:#e4e7ec;--soft:#98a1b0;--faint:#2e343e;--a:#7da2ff;
--b:#f0935b;--c:#5fcf9c;--d:#c48ae8;--e:#e0c04a;--f:#f27a9e;--code:#20252d}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 Inter,system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1060px;margin:0 auto;padding:48px 24px 72px}
h1{font-size:30px;line-height:1.2;margin:0 0 4px;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:19px;margin:52px 0 14px;letter-spacing:-.01em}
p{margin:0 0 12px;max-width:76ch}
.lead,.note,figcaption span,th,.tile span{color:var(--soft)}
.note{font-size:14px}
code,pre{font:13.5px/1.55 ui-monospace,"JetBrains Mono","SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre{margin:0 0 14px;padding:14px 16px;background:var(--code);border:1px solid var(--faint);border-radius:10px;overflow-x:auto}
pre.sample{white-space:pre-wrap;overflow-wrap:anywhere}
pre.sample b{font-weight:600;color:var(--a)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:28px 0 12px}
.tile{background:var(--card);border:1px solid var(--faint);border-radius:12px;padding:14px 16px}
.tile b{display:block;font-size:24px;line-height:1.25;font-weight:650;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.tile span{font-size:13px}
.tile.main{background:var(--a);border-color:var(--a);color:var(--paper)}
.tile.main span{color:inherit;opacity:.85}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px}
figure{margin:0 0 16px;padding:16px 16px 10px;background:var(--card);border:1px solid var(--faint);border-radius:12px;min-width:0}
figcaption{display:flex;flex-wrap:wrap;gap:4px 18px;align-items:baseline;margin-bottom:6px;font-size:14.5px}
figcaption .key{font-size:13px}
.key::before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle;
background:var(--tone)}
.a{--tone:var(--a)}.b{--tone:var(--b)}.c{--tone:var(--c)}.d{--tone:var(--d)}.e{--tone:var(--e)}.f{--tone:var(--f)}
figure>svg{display:block;width:100%;height:auto}
svg text{font:12px Inter,system-ui,sans-serif;fill:var(--soft);font-variant-numeric:tabular-nums}
.grid{stroke:var(--faint)}.axis{stroke:var(--soft);stroke-opacity:.6}
.line{fill:none;stroke:var(--tone);stroke-width:2;stroke-linejoin:round}
.band{fill:var(--tone);fill-opacity:.16}
.dot{fill:var(--tone);stroke:var(--card);stroke-width:1.5}
line.level{stroke:var(--ink);stroke-dasharray:5 4;stroke-opacity:.65}
svg text.level{fill:var(--ink)}
.strip rect{fill:transparent}
.strip g{visibility:hidden;pointer-events:none}.strip:hover g{visibility:visible}
.strip line{stroke:var(--soft);stroke-dasharray:2 3}
svg .strip text{fill:var(--ink);font-weight:600}
table{border-collapse:collapse;font-size:14.5px;width:100%}
th{font-weight:400;text-align:left;padding:5px 16px 5px 0;vertical-align:top;white-space:nowrap}
td{padding:5px 0;overflow-wrap:anywhere}
tr+tr>*{border-top:1px solid var(--faint)}
div.wide{overflow-x:auto}
table.scores td,div.wide{overflow-x:auto}
table.scores th{padding-right:20px}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.bars td.bar{width:55%;padding:5px 16px 5px 0}
.bars i{display:block;height:12px;min-width:2px;border-radius:3px;background:var(--a)}
details{margin-bottom:8px}
summary{cursor:pointer;padding:4px 0;color:var(--soft)}
summary b{color:var(--ink);font-weight:600}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:8px 40px}
.columns h3{font-size:14.5px;margin:14px 0 4px}
footer{margin-top:56px;padding-top:14px;border-top:1px solid var(--faint);font-size:13.5px;color:var(--soft)}
@media (max-width:560px){main{padding:28px 16px 48px}}
@media print{body{background:#fff}figure,.tile,pre{break-inside:avoid}}
"""
