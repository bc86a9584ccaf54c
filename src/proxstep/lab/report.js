"use strict";
// The figures answer: a read-out under the pointer, zoom, and one switch for each algorithm.
// The numbers are those of the paths; the rules of the axes are svg.py's.
(() => {
  const WIDTH = 400, LEFT = 48, TOP = 24, PLOT_WIDTH = 346, PLOT_HEIGHT = 206;
  const NUM_TICKS = 6, LEAST_DRAG = 8;
  const hidden = new Set();

  function make(tag, attributes = {}, text = "") {
    const inSvg = ["path", "rect", "text"].includes(tag);
    const element = inSvg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = text;
    return element;
  }

  function button(text, label, action) {
    const element = make("button", { type: "button", "aria-label": label, title: label }, text);
    element.addEventListener("click", action);
    return element;
  }

  const shorten = (value) => String(Number(value.toPrecision(4)));

  function limits(values, pad, fromZero) {
    const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
    const room = high > low ? (high - low) * pad : Math.abs(low) * 0.1 || 0.5;
    return fromZero && low >= 0 ? [0, high + room] : [low - room, high + room];
  }

  function ticks([low, high], whole) {
    const rough = (high - low) / NUM_TICKS, power = 10 ** Math.floor(Math.log10(rough));
    let step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * (1 - 1e-9));
    if (whole) step = Math.max(step, 1);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i++) found.push(Number((i * step).toPrecision(10)));
    return found;
  }

  function logTicks([low, high]) {
    const factors = high - low < 2.5 ? [1, 2, 5] : [1], found = [];
    const every = factors.length === 1 ? Math.ceil((high - low) / 6) : 1;
    for (let k = Math.floor(low); k <= Math.ceil(high); k++) {
      if (k % every === 0) found.push(...factors.map((factor) => k + Math.log10(factor)));
    }
    return found.filter((tick) => low <= tick && tick <= high);
  }

  function points(path) {
    const numbers = (path?.getAttribute("d") ?? "").match(/-?[\d.]+(?:e[-+]?\d+)?/g) ?? [];
    return numbers.flatMap((x, i) => (i % 2 ? [] : [{ x: Number(x), y: Number(numbers[i + 1]) }]));
  }

  class Curve {
    constructor(element) {
      this.element = element;
      this.algorithm = element.dataset.algorithm;
      this.name = [this.algorithm, element.dataset.label].filter(Boolean).join(", ");
      this.paths = element.querySelectorAll("path");
      this.line = points(element.querySelector(".line"));
      this.band = new Map(); // the edges at each x
      for (const { x, y } of points(element.querySelector(".band"))) {
        this.band.set(x, [...(this.band.get(x) ?? []), y].sort((a, b) => a - b));
      }
    }

    get shown() {
      return !hidden.has(this.algorithm);
    }
  }

  class Chart {
    constructor(figure) {
      this.title = figure.querySelector("h3").textContent;
      this.stage = figure.querySelector(".stage");
      this.svg = this.stage.querySelector(".chart");
      this.plot = this.svg.querySelector(".plot");
      this.ticks = this.svg.querySelector(".ticks");
      const kind = this.svg.dataset.kind.split(" ");
      [this.log, this.fromZero, this.byRun] = ["log", "zero", "runs"].map((word) => kind.includes(word));
      this.names = JSON.parse(this.svg.dataset.names);
      this.curves = [...this.plot.querySelectorAll(".curve")].map((element) => new Curve(element));
      this.whole = limits(this.curves.flatMap((curve) => curve.line.map((p) => p.x)), 0.02, false);
      this.view = this.whole;
      this.cursor = this.plot.appendChild(make("path", { class: "cursor" }));
      this.selection = this.plot.appendChild(make("rect", { class: "selection", height: PLOT_HEIGHT }));
      this.readout = this.stage.appendChild(make("div", { class: "readout", role: "status" }));
      this.addTools(figure);
      this.listen();
    }

    addTools(figure) {
      const tools = make("div", { class: "tools" });
      this.all = button("All", `All of ${this.title}`, () => this.zoomTo(this.whole));
      this.all.disabled = true;
      tools.append(
        button("+", `+ Zoom into ${this.title}`, () => this.zoom(0.5)),
        button("\u2212", `\u2212 Zoom out of ${this.title}`, () => this.zoom(2)),
        this.all,
      );
      figure.firstElementChild.append(tools);
    }

    draw() {
      const shown = this.curves.filter((curve) => curve.shown);
      const inView = ({ x }) => this.view[0] <= x && x <= this.view[1];
      const values = shown.flatMap((curve) => [
        ...curve.line.filter(inView).map((p) => p.y),
        ...[...curve.band].filter(([x]) => inView({ x })).flatMap(([, edges]) => edges),
      ]);
      if (values.length) this.height = limits(values, 0.05, this.fromZero);
      const [low, high] = this.view, [bottom, top] = this.height ?? [0, 1];
      const x = PLOT_WIDTH / (high - low), y = PLOT_HEIGHT / (top - bottom);
      const matrix = `matrix(${x} 0 0 ${-y} ${-low * x} ${top * y})`;
      for (const curve of this.curves) {
        curve.element.classList.toggle("off", !curve.shown);
        for (const path of curve.paths) path.setAttribute("transform", matrix);
      }
      this.ticks.replaceChildren();
      for (const tick of this.log ? logTicks([bottom, top]) : ticks([bottom, top], false)) {
        const at = TOP + (top - tick) * y;
        this.ticks.append(
          make("path", { d: `M${LEFT} ${at}h${PLOT_WIDTH}` }),
          make("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, shorten(this.log ? 10 ** tick : tick)),
        );
      }
      for (const tick of ticks(this.view, !this.byRun)) {
        const at = { x: LEFT + (tick - low) * x, y: TOP + PLOT_HEIGHT + 18, "text-anchor": "middle" };
        this.ticks.append(make("text", at, shorten(tick)));
      }
      this.show(this.at);
    }

    // Zoom about the read-out, or else the middle, by a factor of the width.
    zoom(factor) {
      const [low, high] = this.view, middle = this.at?.x ?? (low + high) / 2;
      this.zoomTo([middle - (middle - low) * factor, middle + (high - middle) * factor]);
    }

    zoomTo([low, high]) {
      const [first, last] = this.whole, narrow = (last - first) / 1000;
      low = Math.max(low, first);
      high = Math.min(high, last);
      if (high - low < narrow) return;
      this.view = [low, high];
      this.all.disabled = low === first && high === last;
      this.draw();
    }

    // All points that are shown, from left to right; of curves that share their x, one for each x.
    places() {
      const [low, high] = this.view, shown = this.curves.filter((curve) => curve.shown);
      const all = shown.flatMap((curve) => curve.line.map((p) => ({ ...p, curve })));
      const found = all.filter((p) => low <= p.x && p.x <= high).sort((a, b) => a.x - b.x);
      return this.byRun ? found : found.filter((p, i) => i === 0 || p.x !== found[i - 1].x);
    }

    nearest(x, y) {
      const [low, high] = this.view, [bottom, top] = this.height;
      const away = (p) => Math.hypot((p.x - x) / (high - low), this.byRun ? (p.y - y) / (top - bottom) : 0);
      return this.places().reduce((best, p) => (best && away(best) <= away(p) ? best : p), undefined);
    }

    show(place) {
      this.at = place;
      this.cursor.setAttribute("d", "");
      this.readout.replaceChildren();
      if (!place) return;
      const rows = this.curves.filter((curve) => curve.shown && (!this.byRun || curve === place.curve));
      const list = make("ul");
      for (const curve of rows) {
        const p = this.byRun ? place : curve.line.find(({ x }) => x === place.x);
        if (!p) continue;
        const value = (y) => shorten(this.log ? 10 ** y : y), edges = curve.band.get(p.x);
        const range = edges && edges[0] < edges[1] ? ` [${edges.map(value).join(", ")}]` : "";
        const row = make("li", {}, `${curve.name} ${value(p.y)}${range}`);
        const swatch = document.querySelector(`.keys [data-algorithm="${CSS.escape(curve.algorithm)}"] .swatch`);
        if (swatch) row.prepend(swatch.cloneNode(true));
        list.append(row);
      }
      if (!list.children.length) return;
      const axis = this.byRun ? "KL" : this.names.length ? this.names[place.x] : "step";
      const text = this.names.length ? axis : `${axis} ${shorten(place.x)}`;
      this.readout.append(make("strong", {}, text), list);
      const at = ((place.x - this.view[0]) / (this.view[1] - this.view[0])) * PLOT_WIDTH;
      this.cursor.setAttribute("d", `M${at} 0V${PLOT_HEIGHT}`);
      const onLeft = at > PLOT_WIDTH / 2;
      this.readout.style.left = onLeft ? `${(100 * LEFT) / WIDTH}%` : "auto";
      this.readout.style.right = onLeft ? "auto" : "0";
    }

    // Where a pointer is, in the plot's units.
    under(event) {
      const box = this.svg.getBoundingClientRect(), unit = WIDTH / box.width;
      const x = (event.clientX - box.left) * unit - LEFT, y = (event.clientY - box.top) * unit - TOP;
      return { x: Math.min(Math.max(x, 0), PLOT_WIDTH), y };
    }

    value(x) {
      return this.view[0] + (x / PLOT_WIDTH) * (this.view[1] - this.view[0]);
    }

    listen() {
      const label = `${this.title}: arrow keys read the values, plus and minus zoom, 0 shows all`;
      for (const [name, value] of Object.entries({ tabindex: 0, role: "group", "aria-label": label })) this.stage.setAttribute(name, value);
      let from = null;
      const select = (to) => {
        this.selection.setAttribute("x", Math.min(from ?? 0, to));
        this.selection.setAttribute("width", from === null ? 0 : Math.abs(to - from));
      };
      const end = (event) => {
        const start = from, { x } = this.under(event);
        from = null;
        select(0);
        return start !== null && Math.abs(x - start) >= LEAST_DRAG ? [start, x].sort((a, b) => a - b) : null;
      };
      this.stage.addEventListener("pointermove", (event) => {
        const { x, y } = this.under(event), [bottom, top] = this.height;
        if (from === null) this.show(this.nearest(this.value(x), top - (y / PLOT_HEIGHT) * (top - bottom)));
        else select(x);
      });
      this.stage.addEventListener("pointerdown", (event) => {
        if (event.pointerType === "touch" || event.button !== 0) return;
        this.stage.setPointerCapture(event.pointerId);
        from = this.under(event).x;
      });
      this.stage.addEventListener("pointerup", (event) => {
        const range = end(event);
        if (range) this.zoomTo(range.map((x) => this.value(x)));
      });
      this.stage.addEventListener("pointercancel", end);
      this.stage.addEventListener("pointerleave", () => from === null && this.show());
      this.stage.addEventListener("dblclick", () => this.zoomTo(this.whole));
      this.stage.addEventListener("blur", () => this.show());
      this.stage.addEventListener("keydown", (event) => this.press(event));
    }

    press(event) {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const places = this.places(), last = places.length - 1;
      const now = this.at ? places.findIndex((p) => p.x === this.at.x && (!this.byRun || p.y === this.at.y)) : -1;
      const to = { ArrowRight: Math.min(now + 1, last), ArrowLeft: now < 0 ? last : Math.max(now - 1, 0), Home: 0, End: last }[event.key];
      if (to !== undefined) this.show(places[to]);
      else if (event.key === "+" || event.key === "=") this.zoom(0.5);
      else if (event.key === "-") this.zoom(2);
      else if (event.key === "0" || event.key === "Escape") {
        this.show();
        this.zoomTo(this.whole);
      } else return;
      event.preventDefault();
    }
  }

  const figures = [...document.querySelectorAll("figure")].filter((figure) => figure.querySelector(".plot"));
  const charts = figures.map((figure) => new Chart(figure));

  function addLegend() {
    const keys = document.querySelector(".keys");
    const legend = make("div", { class: "legend", role: "group", "aria-label": "Algorithms that the figures show" });
    for (const key of keys.children) {
      const name = key.dataset.algorithm, toggle = make("button", { type: "button", "aria-pressed": "true" });
      toggle.append(...[...key.childNodes].map((node) => node.cloneNode(true)));
      toggle.addEventListener("click", () => {
        if (!hidden.delete(name)) hidden.add(name);
        toggle.setAttribute("aria-pressed", String(!hidden.has(name)));
        for (const chart of charts) chart.draw();
      });
      legend.append(toggle);
    }
    document.querySelector(".figures").prepend(legend);
  }

  for (const chart of charts) chart.draw();
  if (charts.length) addLegend();
  document.documentElement.classList.add("scripted");

  // On paper everything is seen.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });
})();
