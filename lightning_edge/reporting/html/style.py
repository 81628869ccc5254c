"""How a page looks: on a phone, on a desk and on paper, in light and in dark."""

from __future__ import annotations

from lightning_edge.reporting.html.picture import COLORS, DARK, LIGHT, MARKS

STATES_LIGHT = "--good:#0a6b45;--warn:#8a5200;--bad:#b3261e;--panel:#f4f6f8;"
STATES_DARK = "--good:#5fd6a2;--warn:#f0b35a;--bad:#ff8a80;--panel:#1f242a;"
_PAPER = f":root{{color-scheme:light;{LIGHT}{STATES_LIGHT}}}"

SHEET = f""":root{{color-scheme:light dark;{LIGHT}{STATES_LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{DARK}{STATES_DARK}}}}}
{MARKS}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif;overflow-wrap:anywhere}}
main{{max-width:1120px;margin:0 auto;padding:24px 16px 64px}}
h1{{font-size:1.75rem;line-height:1.2;margin:0 0 8px}}
h2{{font-size:1.25rem;margin:44px 0 8px;padding-top:12px;border-top:1px solid var(--rule)}}
h3{{font-size:1rem;margin:20px 0 4px}}
p{{margin:8px 0;max-width:75ch}}
a{{color:var(--c0)}}
.lead{{font-size:1.125rem}}
.quiet,figcaption,caption{{color:var(--faint);font-size:.875rem}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:12px;margin:20px 0}}
.tile{{background:var(--panel);border-radius:8px;padding:12px 16px;margin:0}}
.tile dt{{color:var(--faint);font-size:.875rem}}
.tile dd{{margin:0;font-size:.9375rem}}
.tile dd.value{{font-size:1.5rem;font-weight:600;line-height:1.3}}
.pictures{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:24px;margin:16px 0}}
figure{{margin:0;max-width:560px;break-inside:avoid}}
figcaption{{margin-bottom:6px;font-weight:600;color:var(--ink)}}
svg{{display:block;width:100%;height:auto;overflow:visible}}
.scroll{{overflow-x:auto;margin:16px 0;border:1px solid var(--rule);border-radius:8px}}
table{{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}}
caption{{text-align:left;padding:8px 12px}}
th,td{{padding:6px 12px;text-align:right;vertical-align:top;white-space:nowrap;border-top:1px solid var(--rule)}}
thead th{{border-top:0;color:var(--faint);font-weight:600;vertical-align:bottom}}
th:first-child{{text-align:left;position:sticky;left:0;background:var(--paper)}}
tbody th{{font-weight:600}}
.words{{text-align:left}}
.wide{{white-space:normal;min-width:14em}}
th.words{{white-space:nowrap}}
tr.chosen th,tr.chosen td{{background:var(--panel)}}
.state{{display:inline-flex;align-items:center;gap:6px;white-space:nowrap}}
.state svg{{width:12px;height:12px;flex:none;overflow:visible}}
.good{{color:var(--good)}}.warn{{color:var(--warn)}}.bad{{color:var(--bad)}}.unknown{{color:var(--faint)}}
ul{{padding-left:20px;margin:8px 0}}
li{{margin:6px 0}}
.legend{{font-size:.875rem;margin:4px 0}}
.key{{display:inline-block;margin-right:16px;white-space:nowrap}}
.swatch{{display:inline-block;width:11px;height:11px;border-radius:2px}}
{"".join(f".b{number}{{background:var(--c{number})}}" for number in range(COLORS))}
pre{{background:var(--panel);border-radius:8px;padding:12px 16px;font-size:.8125rem;line-height:1.45;
white-space:pre-wrap;max-height:30em;overflow:auto}}
@media (max-width:480px){{.tiles{{grid-template-columns:1fr 1fr;gap:8px}}.tile{{padding:10px 12px}}
.tile dd.value{{font-size:1.25rem}}th,td{{padding:6px 8px}}th:first-child{{white-space:normal;min-width:9em}}}}
@media print{{{_PAPER}main{{padding:0;max-width:none}}pre{{max-height:none;overflow:visible}}
.scroll{{overflow:visible;border:0}}table{{font-size:.6875rem}}
th,td{{padding:3px 5px;white-space:normal;overflow-wrap:break-word}}
.tile,.swatch,tr{{print-color-adjust:exact}}
.pictures{{grid-template-columns:1fr 1fr}}tr,.tile,figure{{break-inside:avoid}}h2{{break-after:avoid}}}}
"""
