// What the pictures share: a frame with axes, lines, whiskers, and a layer that is read by pointer and keyboard.

/** Puts a new picture into its box: grid, ticks and the names of both axes. Returns the SVG. */
function frame(box, width, height, edge, x, y, axes) {
  const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": axes.title });
  const line = (x1, x2, y1, y2) => draw("line", { class: "grid", x1, x2, y1, y2 });
  for (const [value, text] of axes.y)
    svg.append(
      line(edge.left, width - edge.right, y(value), y(value)),
      draw("text", { class: "tick", x: edge.left - 8, y: y(value) + 4, "text-anchor": "end" }, text),
    );
  for (const [value, text] of axes.x) {
    if (axes.upright) svg.append(line(x(value), x(value), edge.top, height - edge.bottom));
    svg.append(draw("text", { class: "tick", x: x(value), y: height - edge.bottom + 18, "text-anchor": "middle" }, text));
  }
  const middle = (height - edge.bottom + edge.top) / 2;
  svg.append(
    draw("text", { class: "axis", x: (edge.left + width - edge.right) / 2, y: height - 8, "text-anchor": "middle" }, axes.below),
    draw("text", { class: "axis", x: 13, y: middle, "text-anchor": "middle", transform: `rotate(-90 13 ${middle})` }, axes.beside),
  );
  box.querySelector(":scope > svg")?.remove();
  box.prepend(svg);
  return svg;
}

/** The path through some points in pixels. */
const polyline = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");

/** An interval as a line with ends; `y` turns its values into pixels. */
const whisker = (x, y, low, high) =>
  known(low) && known(high) && draw("path", { class: "whisker", d: `M${x - 4},${y(low)}h8M${x},${y(low)}V${y(high)}M${x - 4},${y(high)}h8` });

/** Puts a layer over a picture that points at something, and a box for what is said of it. */
function pointer(box, attributes) {
  const layer = el("div", { class: "cursor", role: "slider", tabindex: 0, ...attributes });
  const tip = el("div", { class: "tip", hidden: true });
  box.append(layer, tip);
  /** Shows lines beside a place, or over it where there is no room to its right. */
  const tell = (lines, x, gap, width) => {
    tip.replaceChildren(...lines.map((line, i) => el(i ? "span" : "strong", {}, line)));
    const left = x + gap + tip.offsetWidth < width ? x + gap : x - gap - tip.offsetWidth;
    tip.style.left = `${clamp(left, 0, Math.max(width - tip.offsetWidth, 0))}px`;
  };
  return { layer, tip, tell };
}

/** Puts a closed table of what a picture shows below it. */
function tabulate(box, rows) {
  box.parentElement.querySelector(".as-table")?.remove();
  box.after(el("details", { class: "as-table" }, el("summary", {}, "As a table"), table(rows)));
}
