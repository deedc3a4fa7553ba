"""The look of the page: a theme of system fonts and two papers, one for day and one for night.

No font, script or style comes from another host, so the page is whole without a network. What Gradio's theme
variables cannot say stands in `assets/page.css`, which `demo.document` puts into the head: a style sheet passed as
`css` would have its selectors rewritten.
"""

from pathlib import Path

import gradio as gr

ASSETS = Path(__file__).resolve().parent / "assets"

SANS = "-apple-system, Segoe UI, Roboto, Inter, Noto Sans, Cantarell, Liberation Sans, sans-serif"
MONO = "ui-monospace, SF Mono, Cascadia Mono, Liberation Mono, monospace"
PAPER = "#faf7f0 #f3eee3 #e6dece #d3c8b3 #a99d88 #857a68 #6a6052 #4d453b #302b25 #211e1a #171512 paper"
INK = "#fbf0ec #f5ddd5 #ebbcad #e3a38d #cf7a60 #ac4f37 #8f3d28 #76321f #5c281a #431d13 #2a120b ink"
"""Shades from the lightest (50) to the darkest (950), and the name."""

LIGHT_AND_DARK = {
    "body_background_fill": ("#f6f2e9", "#191714"),
    "body_text_color": ("#2b2620", "#e9e2d4"),
    "body_text_color_subdued": ("#6a6052", "#aa9f8d"),
    "background_fill_primary": ("#fffdf8", "#211e1a"),
    "background_fill_secondary": ("#f3eee3", "#26221d"),
    "border_color_primary": ("#e0d7c5", "#3a342c"),
    "input_background_fill": ("#fffdf8", "#211e1a"),
    "input_background_fill_focus": ("#fffdf8", "#211e1a"),
    "input_border_color": ("#d3c8b3", "#4a4338"),
    "input_border_color_focus": ("*primary_600", "*primary_300"),
    "input_placeholder_color": ("#7d7262", "#958a78"),
    "slider_color": ("*primary_600", "*primary_300"),
    "button_primary_background_fill": ("*primary_600", "*primary_300"),
    "button_primary_background_fill_hover": ("*primary_700", "*primary_200"),
    "button_primary_text_color": ("#fffdf8", "#2a120b"),
    "button_secondary_background_fill_hover": ("*neutral_100", "#2c2822"),
    "button_secondary_border_color": ("#d3c8b3", "#4a4338"),
}
SAME_IN_BOTH = {
    "block_background_fill": "transparent",
    "block_border_width": "0px",
    "block_shadow": "none",
    "block_label_background_fill": "transparent",
    "block_title_text_color": "*body_text_color_subdued",
    "block_info_text_color": "*body_text_color_subdued",
    "input_shadow": "none",
    "input_shadow_focus": "none",
    "button_secondary_background_fill": "transparent",
    "button_secondary_text_color": "*body_text_color",
    "button_border_width": "1px",
}
WITHOUT_DARK = {
    "block_padding": "0",
    "block_title_text_weight": "500",
    "input_border_width": "1px",
    "button_primary_shadow": "none",
    "button_primary_shadow_hover": "none",
    "button_secondary_shadow": "none",
    "button_secondary_shadow_hover": "none",
}


def theme() -> gr.themes.Base:
    """Gradio's variables, set to the colors of `assets/page.css`."""
    paper = gr.themes.Color(*PAPER.split())
    base = gr.themes.Base(
        primary_hue=gr.themes.Color(*INK.split()),
        secondary_hue=paper,
        neutral_hue=paper,
        radius_size=gr.themes.sizes.radius_md,
        font=[gr.themes.Font(name) for name in SANS.split(", ")],
        font_mono=[gr.themes.Font(name) for name in MONO.split(", ")],
    )
    colors = {name: light for name, (light, _) in LIGHT_AND_DARK.items()} | SAME_IN_BOTH
    dark = {name: dark for name, (_, dark) in LIGHT_AND_DARK.items()} | SAME_IN_BOTH
    return base.set(**WITHOUT_DARK, **colors, **{f"{name}_dark": value for name, value in dark.items()})


def asset(name: str) -> str:
    """A file of `assets/`, as text."""
    return (ASSETS / name).read_text(encoding="utf-8")
