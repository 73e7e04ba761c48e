"""Styles of the tab. Colours come from the webui's own variables, so that both themes fit."""

from steer_plugins.report import svg

CSS = (
    f"{svg.STYLE}\n"
    + """
#steering-tab { max-width: 1100px; margin: 0 auto; gap: 18px; }
#steering-tab h3 { margin: 0; font-size: 1.05rem; }
#steering-tab code { overflow-wrap: anywhere; }
.steer-head { align-items: center; gap: 8px 16px; }
.steer-head > :first-child { flex: 1 1 auto !important; min-width: max-content !important; }
.steer-head > button { flex: 0 0 auto !important; }
.steer-head > :last-child { flex: 0 0 auto !important; width: auto; }
.steer-row { align-items: center; flex-wrap: nowrap !important; gap: 8px; }
.steer-row > :first-child { min-width: 0 !important; flex: 1 1 0 !important; }
.steer-row button { align-self: center !important; flex: none !important; }
.steer-row input[type=number] { max-width: 72px; }
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
