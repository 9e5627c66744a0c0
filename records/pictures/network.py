"""Draw the speedrun's network: `python records/pictures/network.py` writes network.svg beside it.

The layers make a U: the first half runs to the right, the second half comes back below it, and each
layer of the first half hands its output down to its counterpart. Lines and letters outside of the
boxes are of a middle grey, which can be read on light and on dark pages.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt

WIDTH, HEIGHT = 980, 384
BOX, TALL = 96, 74  # width and height of a layer's box
LEFT, STEP = 150, 134  # where the first column begins, and from one column to the next
ABOVE, BELOW = 60, 214  # where the two rows of boxes begin
GREY = "#7d8590"
LONG, SHORT, WITHOUT = "#1f6feb", "#79b8ff", "#c9d1d9"
VALUES = ("#f0883e", "#e3b341", "#db61a2")  # one colour for each table of value embeddings


def text(x: float, y: float, words: str, colour: str = GREY, size: int = 13, **more) -> str:
    attributes = dict(x=x, y=y, fill=colour, font_size=size, text_anchor="middle") | more
    return f"<text {joined(attributes)}>{words}</text>"


def joined(attributes: dict) -> str:
    return " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in attributes.items())


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    shape = dict(x=x, y=y, width=width, height=height, rx=6, fill=colour)
    return f"<rect {joined(shape)}/>"


def arrow(path: str, dashed: bool = False) -> str:
    line = dict(d=path, fill="none", stroke=GREY, stroke_width=1.6, marker_end="url(#head)")
    if dashed:
        line["stroke_dasharray"] = "5 4"
    return f"<path {joined(line)}/>"


def place(layer: int, num_layers: int) -> tuple[float, float]:
    """The upper left corner of a layer's box."""
    column = min(layer, num_layers - 1 - layer)
    return LEFT + STEP * column, ABOVE if layer < num_layers // 2 else BELOW


def layer_box(layer: int, hp: train_gpt.Hyperparameters) -> list[str]:
    """A layer: its number, how far its attention reaches, and the value embedding it mixes in."""
    x, y = place(layer, hp.num_layers)
    from_end = hp.num_layers - 1 - layer
    is_long = min(layer, from_end) % 4 == 0
    reach, colour, letters = ("long", LONG, "#ffffff") if is_long else ("short", SHORT, "#0d1117")
    reach = f"{reach} window"
    if layer in hp.attention_free_layers:
        reach, colour, letters = "MLP alone", WITHOUT, "#0d1117"
    middle = x + BOX / 2
    parts = [
        box(x, y, BOX, TALL, colour),
        text(middle, y + 22, f"layer {layer}", letters, font_weight="bold"),
        text(middle, y + 39, reach, letters, 12),
    ]
    table = layer if layer < 3 else 2 - from_end
    if table >= 0:
        parts.append(box(x + 14, y + 48, BOX - 28, 18, VALUES[table]))
        parts.append(text(middle, y + 61, f"values {table + 1}", "#0d1117", 11))
    return parts


def flow(num_layers: int) -> list[str]:
    """The arrows from layer to layer, and those of the skips, which go down."""
    parts = []
    half = num_layers // 2
    for column in range(half):
        x = LEFT + STEP * column
        if column + 1 < half:
            parts.append(arrow(f"M {x + BOX} {ABOVE + TALL / 2} h {STEP - BOX - 3}"))
            parts.append(arrow(f"M {x + STEP} {BELOW + TALL / 2} h {BOX - STEP + 3}"))
        parts.append(arrow(f"M {x + BOX / 2} {ABOVE + TALL} V {BELOW - 3}", dashed=True))
        parts.append(text(x + BOX / 2 + 9, 179, f"× s{half - column}", text_anchor="start"))
    end = LEFT + STEP * (half - 1) + BOX
    turn = f"M {end} {ABOVE + TALL / 2} h 22 V {BELOW + TALL / 2} h -19"
    return [*parts, arrow(turn)]


def picture() -> str:
    """The whole drawing, as SVG."""
    hp = train_gpt.Hyperparameters()
    long, short = hp.max_window, hp.max_window // 2
    head = dict(id="head", viewBox="0 0 8 8", refX=7, refY=4, markerWidth=7, markerHeight=7)
    head |= dict(orient="auto", markerUnits="userSpaceOnUse")
    parts = [
        f'<defs><marker {joined(head)}><path d="M0 0L8 4L0 8z" fill="{GREY}"/></marker></defs>'
    ]
    parts += flow(hp.num_layers)
    for layer in range(hp.num_layers):
        parts += layer_box(layer, hp)
    middle = 66
    parts += [
        text(middle, ABOVE + TALL / 2 - 12, "tokens"),
        text(middle, ABOVE + TALL / 2 + 5, "embed, norm"),
        text(middle, ABOVE + TALL / 2 + 22, "= x0"),
        arrow(f"M 112 {ABOVE + TALL / 2} H {LEFT - 3}"),
        arrow(f"M {LEFT} {BELOW + TALL / 2} H 115"),
        text(middle, BELOW + TALL / 2 - 12, "norm, head"),
        text(middle, BELOW + TALL / 2 + 5, "30 σ(x / 7.5)"),
        text(middle, BELOW + TALL / 2 + 22, "cross-entropy"),
    ]
    notes = (
        "Every layer:  x = a x + b x0,  x = x + attention(norm(x)),  x = x + MLP(norm(x));"
        "  a, b and s are learned.",
        f"A long window ends at {long:,} tokens, a short one at {short:,}; both begin at 128. "
        "Layers with one colour of values share a table.",
    )
    parts.append(text(WIDTH / 2, 30, f"{hp.num_layers} layers of width {hp.model_dim}", size=15))
    for line, note in enumerate(notes):
        parts.append(text(WIDTH / 2, HEIGHT - 48 + 22 * line, note))
    size = dict(width=WIDTH, height=HEIGHT, viewBox=f"0 0 {WIDTH} {HEIGHT}")
    size["font_family"] = "Helvetica, Arial, sans-serif"
    namespace = 'xmlns="http://www.w3.org/2000/svg"'
    size_and_font = joined(size).replace("font_family", "font-family")
    return "\n".join([f"<svg {namespace} {size_and_font}>", *parts, "</svg>", ""])


if __name__ == "__main__":
    path = Path(__file__).with_suffix(".svg")
    path.write_text(picture())
    print(f"The network is drawn in {path}.")
