"""Styles of the tab. Colours come from the webui's own variables, so that both themes fit."""

from steer_plugins.report import svg

CSS = (
    f"{svg.STYLE}\n"
    + """
#steering-tab { max-width: 1100px; margin: 0 auto; gap: 18px; }
#steering-tab h3 { margin: 0; font-size: 1.05rem; }
#steering-tab code { overflow-wrap: anywhere; }
#steering-tab [hidden], #steering-strip[hidden], #steering-strip [hidden] { display: none !important; }
#steering-panel { display: grid; gap: 16px; color: var(--body-text-color); }
#steering-panel h4 { margin: 0; font-size: 1rem; font-weight: 600; flex: 1 1 auto; }
#steering-panel p { margin: 0; }
.steer-columns { display: flex; flex-wrap: wrap; gap: 20px; align-items: flex-start; }
.steer-column { display: grid; gap: 16px; min-width: 0; }
.steer-column:first-child { flex: 3 1 480px; } .steer-column:last-child { flex: 2 1 280px; }
.steer-part { display: grid; gap: 8px; min-width: 0; }
.steer-line { display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: center; }
.steer-line > select, .steer-line > textarea, .steer-line > input[type=text] { flex: 1 1 160px; min-width: 0; }
#steering-panel select, #steering-panel textarea, #steering-panel input[type=text], #steering-panel input[type=number],
#steering-strip select { background: var(--input-background-fill, var(--background-fill-secondary)); color: inherit;
  border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 5px 8px; font-size: .9rem; line-height: 1.4; }
#steering-panel select, #steering-strip select { -webkit-appearance: auto !important; appearance: auto !important; }
#steering-tab select option, #steering-strip select option { background: var(--background-fill-primary, #fff); }
#steering-panel textarea { resize: none; overflow: hidden; font-family: var(--font-mono, monospace); }
#steering-panel button, #steering-strip button { border: 1px solid var(--border-color-primary); border-radius: 6px;
  padding: 4px 12px; font-size: .9rem; background: transparent; color: inherit; cursor: pointer; min-width: 0; }
#steering-panel button:hover, #steering-strip button:hover { border-color: var(--accent, #4a72ff); }
#steering-panel button:disabled { opacity: .5; cursor: default; }
#steering-panel button.steer-main { background: var(--accent, #4a72ff); border-color: transparent; color: #fff; }
#steering-panel :focus-visible, #steering-strip :focus-visible { outline: 2px solid var(--accent, #4a72ff); outline-offset: 1px; }
.steer-check { display: inline-flex; gap: 8px; align-items: baseline; cursor: pointer; font-size: .92rem; }
.steer-check input { align-self: center; flex: none; width: 16px; height: 16px; accent-color: var(--accent, #4a72ff);
  -webkit-appearance: auto !important; appearance: auto !important; box-shadow: none !important; }
#steering-traits { display: grid; gap: 6px; }
#steering-rows { display: grid; gap: 10px; }
.steer-row { display: grid; grid-template-columns: minmax(70px, 9em) minmax(0, 1fr) auto;
  gap: 2px 10px; align-items: center; font-size: .92rem; }
.steer-row .steer-head { min-width: 0; overflow-wrap: anywhere; line-height: 1.25; }
.steer-name { font-weight: 600; display: block; } .steer-tag { font-size: .75rem; color: var(--body-text-color-subdued); }
.steer-pole { color: var(--body-text-color-subdued); font-size: .85rem; line-height: 1.2; overflow-wrap: anywhere; }
.steer-scale { display: flex; gap: 10px; align-items: center; min-width: 0; }
.steer-pole { flex: 0 1 6em; min-width: 3em; } .steer-pole.low { text-align: right; }
.steer-ends { display: flex; gap: 4px; align-items: center; }
.steer-ends input[type=number] { width: 4.6em; text-align: right; padding: 3px 6px !important; }
#steering-panel .steer-ends button { padding: 2px 8px; border-color: transparent; color: var(--body-text-color-subdued); }
.steer-row.beyond .steer-ends input, .steer-row.beyond .steer-tag { color: #d1671f; }
.steer-track { position: relative; flex: 1 1 90px; display: flex; align-items: center; height: 26px; }
.steer-track::before, .steer-track::after { content: ""; position: absolute; pointer-events: none; }
.steer-track::before { left: 8px; right: 8px; height: 4px; border-radius: 2px; background: linear-gradient(to right,
  var(--border-color-primary) var(--from), var(--accent, #4a72ff) var(--from) var(--to), var(--border-color-primary) var(--to)); }
.steer-track::after { left: calc(50% - 1px); width: 2px; height: 14px; background: var(--body-text-color-subdued); opacity: .6; }
.steer-track input[type=range] { -webkit-appearance: none; appearance: none; width: 100%; height: 26px !important; margin: 0;
  position: relative; z-index: 1; background: transparent !important; cursor: pointer; }
.steer-track input[type=range]::-webkit-slider-runnable-track { background: transparent; height: 16px; }
.steer-track input[type=range]::-moz-range-track { background: transparent; }
.steer-track input[type=range]::-webkit-slider-thumb { -webkit-appearance: none; width: 16px; height: 16px; margin: 0;
  border-radius: 50%; background: var(--accent, #4a72ff); border: 2px solid var(--background-fill-primary, #fff); }
.steer-details { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; padding: 6px 0 10px;
  font-size: .85rem; }
.steer-details input[type=text] { width: 6em; }
#chat-input-row:not(.chat-input-positioned) { position: relative; }
#steering-strip { position: absolute; left: 0; right: 0; bottom: calc(100% + 4px); display: flex; flex-wrap: wrap; gap: 4px 16px;
  align-items: center; padding: 4px 14px !important; border-radius: 10px; font-size: .82rem; color: var(--body-text-color);
  background: var(--body-background-fill, var(--background-fill-primary)); }
.steer-fell { flex: 1 1 100%; color: #d1671f; }
.dark .steer-check input { color-scheme: dark; }
.steer-strip-rows { display: flex; flex-wrap: wrap; gap: 2px 16px; flex: 1 1 auto; }
.steer-strip-rows label { display: inline-flex; gap: 6px; align-items: center; }
.steer-strip-rows input[type=range] { width: 90px; accent-color: var(--accent, #4a72ff); }
.steer-strip-rows output { min-width: 2.6em; font-variant-numeric: tabular-nums; }
#steering-panel.first .steer-column:last-child { flex: 1 1 100%; max-width: 720px; }
#steering-panel.first #steering-card { padding: 16px 20px; border: 1px solid var(--border-color-primary); border-radius: 10px; }
@media (width <= 640px) {
  .steer-row { grid-template-columns: 1fr auto; }
  .steer-scale { grid-row: 2; grid-column: 1 / -1; } .steer-pole { flex: 0 1 auto; }
  .steer-status { margin-left: 44px; }
}
.steer-status { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 12px; padding: 8px 12px; border-radius: 8px;
  background: var(--bg-input, var(--background-fill-secondary)); color: var(--body-text-color); overflow-wrap: anywhere; }
.steer-status i { width: 10px; height: 10px; border-radius: 50%; background: #2ea043; align-self: center; flex: none; }
.steer-status.warn i { background: #d29922; }
.steer-status span { color: var(--body-text-color-subdued); }
.steer-note.bad { border-left: 3px solid #d1671f; padding: 4px 10px; margin: 4px 0; overflow-wrap: anywhere; }
.steer-hidden { display: none !important; }
.steer-quiet { color: var(--body-text-color-subdued); margin: 4px 0; }
.steer-job { margin: 6px 0; overflow-wrap: anywhere; }
.steer-bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); margin-top: 4px; overflow: hidden; }
.steer-bar i { display: block; height: 100%; background: var(--accent, #4a72ff); transition: width .4s; }
.steer-charts { display: flex; flex-wrap: wrap; gap: 24px; }
.steer-chart { flex: 1 1 320px; min-width: 0; max-width: 520px; margin: 0; color: var(--body-text-color);
  --a: #3b62e0; --b: #b4530f; }
.dark .steer-chart { --a: #7f9cff; --b: #f0935a; }
.steer-chart figcaption { font-weight: 600; margin-bottom: 4px; }
.steer-card { flex: 1 1 320px; min-width: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; margin: 0; }
#steering-tab .small-button { min-width: 84px !important; white-space: nowrap; }
#steering-tab .form { gap: 12px; }
#steering-tab .label-wrap { text-align: left; gap: 12px; }
#steering-tab .label-wrap > span:first-child { flex: 1 1 auto; min-width: 0; }
#steering-tab .label-wrap > .icon { flex: none; }
#steering-picture { overflow-x: auto; }
#steering-picture table { margin: 0; }
#steering-picture td, #steering-picture th { border: 0; }
#steering-picture td { padding: 0; }
"""
)
