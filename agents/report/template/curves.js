// The figure of cost-accuracy curves: a cursor that reads all curves at one cost, by pointer or arrow keys.
const SHAPES = [
  (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0z`,
  (r) => `M${-r},${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  (r) => `M0,${-1.25 * r}L${1.15 * r},${0.85 * r}H${-1.15 * r}z`,
  (r) => `M0,${-1.35 * r}L${1.35 * r},0L0,${1.35 * r}L${-1.35 * r},0z`,
  (r) => `M0,${1.25 * r}L${1.15 * r},${-0.85 * r}H${-1.15 * r}z`,
  (r) => `M${-r / 2.4},${-1.2 * r}h${r / 1.2}v${0.8 * r}h${0.8 * r}v${r / 1.2}h${-0.8 * r}v${0.8 * r}h${-r / 1.2}v${-0.8 * r}h${-0.8 * r}v${-r / 1.2}h${0.8 * r}z`,
];
const STAR = (r) =>
  `M${Array.from({ length: 10 }, (_, i) => {
    const size = i % 2 ? 0.62 * r : 1.55 * r;
    const angle = (Math.PI * i) / 5 - Math.PI / 2;
    return `${(size * Math.cos(angle)).toFixed(2)},${(size * Math.sin(angle)).toFixed(2)}`;
  }).join("L")}z`;

const shapeOf = (method, i) => (method.kind === "oracle" ? STAR : SHAPES[i % SHAPES.length]);
const seriesOf = (method, i) => (method.kind === "oracle" ? "series oracle" : `series s${i % SHAPES.length}`);

/** Accuracy of a curve at cost c with its band, by straight lines between the costs at which it is known. */
function readBand(band, c) {
  const at = band.c.findIndex((x) => x >= c - 1e-9);
  if (at < 0) return [null, null, null];
  const before = Math.max(at - 1, 0);
  const width = band.c[at] - band.c[before];
  const part = width > 0 ? (c - band.c[before]) / width : 1;
  return [band.accuracy, band.low, band.high].map((values) =>
    known(values[before]) && known(values[at])
      ? values[before] + (values[at] - values[before]) * part
      : values[at] ?? null,
  );
}

function startCurves() {
  const box = byId("curve-chart");
  const legend = byId("curve-legend");
  const hidden = new Set(data.methods.map((method) => method.name).filter((name) => name.startsWith("query oracle")));
  const state = { c: 0.2, point: null };
  let geometry = null;

  const { layer, tip, tell } = pointer(box, {
    "aria-label": "Cost at which the curves are read; left and right move it, up and down go through operating points",
    "aria-valuemin": 0,
    "aria-valuemax": 100,
    "aria-describedby": "curve-note",
  });

  const rows = data.methods.map((method, i) => {
    const value = el("output", {});
    const button = el(
      "button",
      { type: "button", "aria-pressed": String(!hidden.has(method.name)), class: seriesOf(method, i) },
      draw("svg", { viewBox: "-16 -9 32 18", "aria-hidden": "true" },
        draw("path", { class: "stroke", d: "M-15,0H15" }),
        draw("path", { class: "mark", d: shapeOf(method, i)(5) })),
      el("span", { class: "name" }, method.name),
      value,
    );
    button.addEventListener("click", () => {
      if (hidden.has(method.name)) hidden.delete(method.name);
      else hidden.add(method.name);
      button.setAttribute("aria-pressed", String(!hidden.has(method.name)));
      state.point = null;
      redraw();
    });
    return { method, button, value };
  });
  const heading = el("p", { class: "at" });
  legend.append(
    heading,
    ...rows.map((row) => row.button),
    el("p", { class: "key" }, el("span", { class: "dash mixing" }), "by mixing with always-large"),
    el("p", { class: "key" }, el("span", { class: "dash random" }), "random mixing of the two models"),
    el("p", { class: "key" }, "Open marks are not on the hull: no budget uses them."),
  );

  const visible = () => data.methods.map((method, i) => ({ method, i })).filter(({ method }) => !hidden.has(method.name));
  const operating = () =>
    visible()
      .flatMap(({ method, i }) => method.points.map((point) => ({ method, i, point })))
      .sort((a, b) => a.point.c - b.point.c);

  const mark = (method, i, { c, accuracy }, size, kind) =>
    draw("path", { class: kind, d: shapeOf(method, i)(size),
      transform: `translate(${geometry.x(c).toFixed(1)},${geometry.y(accuracy[0]).toFixed(1)})` });

  const redraw = onWidth(box, (width) => {
    const height = clamp(0.58 * width, 280, 460);
    const edge = { left: 46, right: 14, top: 14, bottom: 46 };
    const lines = visible();
    const [small, large] = Object.values(data.references);
    const heights = [small, large].flatMap((each) => each.accuracy);
    for (const { method } of lines) {
      if (method.kind !== "oracle") heights.push(...method.band.low, ...method.band.high);
      heights.push(...method.points.map((point) => point.accuracy[0]));
    }
    const found = heights.filter(known);
    const span = Math.max(Math.max(...found) - Math.min(...found), 0.01);
    const range = [Math.max(Math.min(...found) - 0.1 * span, -0.02), Math.min(Math.max(...found) + 0.06 * span, 1.02)];
    const most = Math.max(1, ...lines.flatMap(({ method }) => method.points.map((point) => point.c)));
    const x = (c) => edge.left + ((width - edge.left - edge.right) * (c + 0.01)) / (most + 0.02);
    const y = (a) => height - edge.bottom - ((height - edge.top - edge.bottom) * (a - range[0])) / (range[1] - range[0]);
    geometry = { width, height, edge, x, y, most };
    const path = (points) => polyline(points.map(([c, a]) => [x(c), y(a)]));
    const svg = frame(box, width, height, edge, x, y, {
      title: `Curves of accuracy against ${COST}; the tables below hold the same numbers`,
      y: ticks(100 * range[0], 100 * range[1], height / 48).map((tick) => [tick / 100, decimal(tick, 0)]),
      x: ticks(0, 100 * most, width / 75).map((tick) => [tick / 100, decimal(tick, 0)]),
      upright: true,
      below: `${COST[0].toUpperCase()}${COST.slice(1)}, % of always-large`, beside: "Accuracy, %",
    });

    for (const { method, i } of lines) {
      if (method.kind === "oracle") continue;
      const whole_ = method.band.c.map((c, k) => [c, method.band.low[k], method.band.high[k]]).filter((each) => each.every(known));
      if (whole_.length)
        svg.append(draw("path", { class: `band ${seriesOf(method, i)}`,
          d: `${path(whole_.map(([c, low]) => [c, low]))}L${path(whole_.reverse().map(([c, , high]) => [c, high])).slice(1)}z` }));
    }
    svg.append(draw("path", { class: "mixture", d: path([[small.c[0], small.accuracy[0]], [large.c[0], large.accuracy[0]]]) }));
    for (const { method, i } of lines) {
      const group = draw("g", { class: seriesOf(method, i) });
      if (method.kind === "oracle") {
        group.append(draw("path", { class: "stroke", d: path(method.points.map((point) => [point.c, point.accuracy[0]])) }));
      } else {
        const knots = method.knots.filter((knot) => knot.every(known));
        const end = [1, knots.at(-1)[1]];
        const solid = knots.filter(([c]) => c <= method.mixing_from + 1e-9);
        const rest = [...knots.filter(([c]) => c >= method.mixing_from - 1e-9), end];
        const mixed = knots.at(-1)[0] > method.mixing_from + 1e-9;
        group.append(draw("path", { class: "stroke", d: path(solid) }),
          draw("path", { class: mixed ? "stroke mixing" : "stroke", d: path(rest) }));
      }
      for (const point of method.points)
        group.append(mark(method, i, point, 4.5, point.on_curve || method.kind === "oracle" ? "mark" : "mark open"));
      svg.append(group);
    }
    for (const [name, each] of Object.entries(data.references)) {
      const right = each === large;
      const low = right ? y(each.accuracy[0]) + 26 < height - edge.bottom : y(each.accuracy[0]) + 20 > height - edge.bottom;
      svg.append(
        draw("circle", { class: "reference", cx: x(each.c[0]), cy: y(each.accuracy[0]), r: 5 }),
        draw("text", { class: "named", x: x(each.c[0]) + (right ? -8 : 9), "text-anchor": right ? "end" : "start",
          y: y(each.accuracy[0]) + (right === low ? 22 : right ? -12 : low ? -10 : 16) },
          `${name} ${percent(each.accuracy[0])}`),
      );
    }
    geometry.cursor = draw("g", { class: "reading" });
    svg.append(geometry.cursor);
    layer.style.height = `${height}px`;
    read();
  });

  /** Shows what the curves say at the cursor. */
  function read() {
    const { x, y, height, edge, most } = geometry;
    const c = clamp(state.c, 0, most);
    heading.textContent = `At a cost of ${percent(c)}:`;
    geometry.cursor.replaceChildren(draw("line", { x1: x(c), x2: x(c), y1: edge.top, y2: height - edge.bottom }));
    const said = [];
    data.methods.forEach((method, i) => {
      const off = hidden.has(method.name);
      const values = off || method.kind === "oracle" || c > 1 ? [null, null, null] : readBand(method.band, c);
      rows[i].value.textContent = off ? "hidden" : known(values[0]) ? interval(values) : "";
      if (!known(values[0])) return;
      said.push(`${method.name} ${interval(values)}`);
      geometry.cursor.append(draw("circle", { class: seriesOf(method, i), cx: x(c), cy: y(values[0]), r: 4 }));
    });
    layer.setAttribute("aria-valuenow", (100 * c).toFixed(1));
    let text = `At ${percent(c)} cost: ${said.join("; ")}`;
    tip.hidden = !state.point;
    if (state.point) {
      const { method, i, point } = state.point;
      geometry.cursor.append(mark(method, i, point, 8, `${seriesOf(method, i)} ring`));
      const lines = describe(state.point);
      tell([method.name, ...lines], x(point.c), 14, geometry.width);
      const top = y(point.accuracy[0]) + 12;
      tip.style.top = `${top + tip.offsetHeight > height ? Math.max(y(point.accuracy[0]) - tip.offsetHeight - 12, 0) : top}px`;
      text = `${method.name}, ${lines.join(", ")}`;
    }
    layer.setAttribute("aria-valuetext", text);
  }

  const traceOf = ({ method, point }) =>
    data.settings.findIndex((each) => each.method === method.name && each.knob === point.knob);

  function describe(where) {
    const { method, point } = where;
    const lines = [
      `${knobName(method)} ${Number(point.knob.toPrecision(3))}`,
      `accuracy ${interval(point.accuracy)}`,
      `cost ${percent(point.c)}, ${decimal(point.large_tokens)} large tokens`,
      `gap recovered ${interval(point.pgr)}`,
      `${decimal(point.escalations, 2)} escalations per problem`,
    ];
    if (!point.on_curve && method.kind !== "oracle") lines.push("not on the hull");
    if (traceOf(where) >= 0) lines.push("click or Enter: its solutions");
    return lines;
  }

  const knobName = (method) => {
    if (method.kind === "threshold") return "threshold";
    if (method.kind === "random") return "rate";
    if (method.kind === "cascade" || method.kind === "query-level") return "setting";
    const own = data.settings.find((each) => each.method === method.name);
    return own && !own.label.startsWith("λ") ? own.label.split("=")[0] : "λ";
  };

  function openTraces() {
    if (!state.point) return;
    const index = traceOf(state.point);
    if (index < 0) return;
    chosen.set(index);
    byId("problems").scrollIntoView();
    byId("problem-list").focus({ preventScroll: true });
  }

  layer.addEventListener("pointermove", (event) => {
    const place = layer.getBoundingClientRect();
    const [left, top] = [event.clientX - place.left, event.clientY - place.top];
    const { x, y, edge, width, most } = geometry;
    state.c = clamp(((left - edge.left) / (width - edge.left - edge.right)) * (most + 0.02) - 0.01, 0, most);
    let nearest = 15;
    state.point = null;
    for (const each of operating()) {
      const distance = Math.hypot(x(each.point.c) - left, y(each.point.accuracy[0]) - top);
      if (distance < nearest) [nearest, state.point] = [distance, each];
    }
    if (state.point) state.c = state.point.point.c;
    read();
  });
  layer.addEventListener("pointerleave", () => {
    state.point = null;
    read();
  });
  layer.addEventListener("click", openTraces);
  layer.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -0.01, ArrowRight: 0.01, PageDown: -0.1, PageUp: 0.1, Home: -9, End: 9 };
    if (event.key in steps) {
      state.point = null;
      state.c = clamp(Math.round(100 * (state.c + steps[event.key])) / 100, 0, geometry.most);
    } else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      const all = operating();
      const now = state.point ? all.findIndex((each) => each.point === state.point.point) : -1;
      const next = now < 0
        ? Math.max(all.findIndex((each) => each.point.c >= state.c), 0)
        : clamp(now + (event.key === "ArrowUp" ? 1 : -1), 0, all.length - 1);
      if (!all.length) return;
      state.point = all[next];
      state.c = state.point.point.c;
    } else if (event.key === "Escape") {
      state.point = null;
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      openTraces();
      return;
    } else return;
    event.preventDefault();
    read();
  });
  byId("curve-note").textContent =
    `${tidy(data.caption)} Bands and brackets are 95 % bootstrap intervals over problems (${whole(data.subject.resamples)} ` +
    "resamples), point by point and for each method by itself: whether two methods differ is said by the paired " +
    "comparisons above, not by bands that overlap. Oracles know how every solution ends; they bound what is possible. " +
    "Point at the figure, or focus it and use the arrow keys; the names switch methods on and off.";
}
