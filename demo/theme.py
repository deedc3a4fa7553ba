"""The look of the page: a theme of system fonts and two papers, one for day and one for night.

No font, script or style comes from another host, so the page is whole without a network. What Gradio's theme
variables cannot say stands in `assets/page.css`, which is put into the page's head: a style sheet passed as
`css` would have its selectors rewritten.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

ASSETS = Path(__file__).resolve().parent / "assets"

SANS = (
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "Inter",
    "Noto Sans",
    "Cantarell",
    "Liberation Sans",
    "sans-serif",
)
MONO = ("ui-monospace", "SF Mono", "Cascadia Mono", "Liberation Mono", "monospace")


def theme() -> gr.themes.Base:
    """Gradio's variables, set to the colors of `assets/page.css`."""
    paper = gr.themes.Color(
        name="paper",
        c50="#faf7f0",
        c100="#f3eee3",
        c200="#e6dece",
        c300="#d3c8b3",
        c400="#a99d88",
        c500="#857a68",
        c600="#6a6052",
        c700="#4d453b",
        c800="#302b25",
        c900="#211e1a",
        c950="#171512",
    )
    ink = gr.themes.Color(
        name="ink",
        c50="#fbf0ec",
        c100="#f5ddd5",
        c200="#ebbcad",
        c300="#e3a38d",
        c400="#cf7a60",
        c500="#ac4f37",
        c600="#8f3d28",
        c700="#76321f",
        c800="#5c281a",
        c900="#431d13",
        c950="#2a120b",
    )
    base = gr.themes.Base(
        primary_hue=ink,
        secondary_hue=paper,
        neutral_hue=paper,
        radius_size=gr.themes.sizes.radius_md,
        font=[gr.themes.Font(name) for name in SANS],
        font_mono=[gr.themes.Font(name) for name in MONO],
    )
    return base.set(
        body_background_fill="#f6f2e9",
        body_background_fill_dark="#191714",
        body_text_color="#2b2620",
        body_text_color_dark="#e9e2d4",
        body_text_color_subdued="#6a6052",
        body_text_color_subdued_dark="#aa9f8d",
        background_fill_primary="#fffdf8",
        background_fill_primary_dark="#211e1a",
        background_fill_secondary="#f3eee3",
        background_fill_secondary_dark="#26221d",
        border_color_primary="#e0d7c5",
        border_color_primary_dark="#3a342c",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_shadow="none",
        block_shadow_dark="none",
        block_padding="0",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_title_text_color="*body_text_color_subdued",
        block_title_text_color_dark="*body_text_color_subdued",
        block_title_text_weight="500",
        block_info_text_color="*body_text_color_subdued",
        block_info_text_color_dark="*body_text_color_subdued",
        input_background_fill="#fffdf8",
        input_background_fill_dark="#211e1a",
        input_background_fill_focus="#fffdf8",
        input_background_fill_focus_dark="#211e1a",
        input_border_color="#d3c8b3",
        input_border_color_dark="#4a4338",
        input_border_color_focus="*primary_600",
        input_border_color_focus_dark="*primary_300",
        input_placeholder_color="#7d7262",
        input_placeholder_color_dark="#958a78",
        input_border_width="1px",
        input_shadow="none",
        input_shadow_dark="none",
        input_shadow_focus="none",
        input_shadow_focus_dark="none",
        slider_color="*primary_600",
        slider_color_dark="*primary_300",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_300",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_200",
        button_primary_text_color="#fffdf8",
        button_primary_text_color_dark="#2a120b",
        button_primary_shadow="none",
        button_primary_shadow_hover="none",
        button_secondary_background_fill="transparent",
        button_secondary_background_fill_dark="transparent",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_hover_dark="#2c2822",
        button_secondary_border_color="#d3c8b3",
        button_secondary_border_color_dark="#4a4338",
        button_secondary_text_color="*body_text_color",
        button_secondary_text_color_dark="*body_text_color",
        button_secondary_shadow="none",
        button_secondary_shadow_hover="none",
        button_border_width="1px",
        button_border_width_dark="1px",
    )


def head() -> str:
    """What stands in the page's `<head>`: its style, and the script for keys, theme, saving and linking."""
    style = asset("page.css") + asset("experiments.css")
    script = asset("page.js") + asset("experiments.js")
    described = "Type a beginning; a small language model goes on with it while you watch."
    return (
        f'<meta name="description" content="{described}">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<style>\n{style}</style>\n<script>\n{script}</script>\n"
    )


def book_script() -> str:
    """The script that draws the story, run once when its component has loaded."""
    return asset("book.js")


def asset(name: str) -> str:
    """A file of `assets/`, as text."""
    return (ASSETS / name).read_text(encoding="utf-8")
