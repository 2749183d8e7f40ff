"use strict";
(() => {
  const HEAD = 38, BAR = 64; // pixels of a title, and of a colour bar
  const CONFIG = {
    displaylogo: false, scrollZoom: false,
    modeBarButtons: [["toImage", "resetScale2d", "resetCameraDefault3d"]],
  };
  const root = document.documentElement;
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  let printing = false;

  const isDark = () =>
    !printing && (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);

  /** A colour as it is seen on the present ground, with an opacity. */
  function toned(color, opacity = 1) {
    const parts = [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
    const seen = isDark() ? parts.map((part) => Math.round(part + 0.35 * (255 - part))) : parts;
    return `rgba(${seen}, ${opacity})`;
  }

  /** An array of one or two axes; what is not finite is null. */
  function numbers({ shape, data }) {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const all = Array.from(new Float32Array(bytes.buffer), (x) => (Number.isFinite(x) ? x : null));
    if (shape.length === 1) return all;
    const [rows, columns] = shape;
    return Array.from({ length: rows }, (_, i) => all.slice(i * columns, (i + 1) * columns));
  }

  function painted(trace) {
    if (!trace.color) return trace;
    const color = toned(trace.color);
    const error = (bars) => bars && { color, thickness: 1.5, width: 3, ...bars };
    return {
      ...trace,
      line: { color, ...trace.line },
      marker: { color, ...trace.marker },
      error_x: error(trace.error_x),
      error_y: error(trace.error_y),
    };
  }

  /** Around a curve, as far as its errors are known; `floor` is where a logarithmic axis ends. */
  function band({ x, y, band: errors, floor = -Infinity, name, color }) {
    const known = x.map((_, i) => i).filter((i) => y[i] !== null && errors[i] !== null);
    const ends = (i, sign) => Math.max(y[i] + sign * errors[i], floor);
    const back = [...known].reverse();
    return {
      type: "scatter", mode: "none", fill: "toself", fillcolor: toned(color, 0.2), name,
      x: [...known, ...back].map((i) => x[i]), hoverinfo: "skip",
      y: [...known.map((i) => ends(i, 1)), ...back.map((i) => ends(i, -1))],
    };
  }

  /** The text in lines of at most so many pixels, at most two. */
  function inLines(text, width) {
    if (6.5 * text.length <= width) return text;
    const words = text.split(" ");
    let first = words.shift();
    while (words.length && 6.5 * (first.length + words[0].length) < width) {
      first += ` ${words.shift()}`;
    }
    return [first, words.join(" ")].join("<br>");
  }

  /** Panels side by side, as many as fit: what plotly.js takes. */
  function arranged(panels, isShown, width, camera) {
    const ink = getComputedStyle(document.body).color;
    const rule = isDark() ? "#3a424c" : "#d8dde3", ground = isDark() ? "#1d232a" : "#f5f7f9";
    const widest = Math.max(...panels.map((panel) => panel.width));
    const columns = Math.max(1, Math.min(panels.length, Math.floor(width / widest)));
    const bar = panels.some((panel) => panel.coloraxis) ? BAR : 0;
    const heights = [];
    panels.forEach((panel, i) => {
      const row = Math.floor(i / columns);
      heights[row] = Math.max(heights[row] ?? 0, panel.height);
    });
    const height = heights.reduce((sum, row) => sum + row, bar);
    const axis = (own) => ({
      color: ink, gridcolor: rule, zerolinecolor: rule, linecolor: rule, nticks: 6,
      ...own, title: { standoff: 4, ...own.title },
    });
    const layout = {
      width, height, showlegend: false, annotations: [], hovermode: "closest",
      margin: { l: 0, r: 0, t: 0, b: 0 }, dragmode: touch ? false : "zoom",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, size: 12, family: "system-ui, sans-serif" },
      hoverlabel: { bgcolor: ground, bordercolor: rule, font: { color: ink } },
    };
    const traces = [];
    let top = height;
    panels.forEach((panel, i) => {
      const column = i % columns, row = Math.floor(i / columns), n = i ? i + 1 : "";
      if (i && !column) top -= heights[row - 1];
      const left = (column * width) / columns, right = left + width / columns;
      const bottom = top - heights[row];
      const x = (from, to) => [(left + from) / width, (right - to) / width];
      const y = (from, to) => [(bottom + from) / height, (top - to) / height];
      const head = panel.title ? HEAD : 12;
      let where;
      if (panel.axes.scene) {
        where = { scene: `scene${n}` };
        const sides = Object.entries(panel.axes.scene).map(([side, own]) => [
          side, axis({ backgroundcolor: ground, showbackground: true, ...own }),
        ]);
        layout[`scene${n}`] = {
          ...Object.fromEntries(sides), aspectmode: "cube", camera, dragmode: "turntable",
          domain: { x: x(2, 2), y: y(2, head) },
        };
      } else {
        where = { xaxis: `x${n}`, yaxis: `y${n}` };
        const equal = panel.square ? { scaleanchor: `x${n}`, constrain: "domain" } : {};
        layout[`xaxis${n}`] = axis({
          domain: x(panel.side, 14), anchor: `y${n}`, constrain: "domain", ...panel.axes.x,
        });
        layout[`yaxis${n}`] = axis({
          domain: y(panel.foot, head), anchor: `x${n}`, ...equal, ...panel.axes.y,
        });
        panel.notes.forEach((note) => layout.annotations.push({
          xref: `x${n} domain`, yref: `y${n}`, showarrow: false, ...note,
        }));
      }
      layout.annotations.push({
        text: inLines(panel.title, width / columns - 10), xref: "paper", yref: "paper",
        x: (left + right) / 2 / width, y: (top - 2) / height, yanchor: "top", showarrow: false,
        font: { size: 13 },
      });
      for (const trace of panel.traces.filter(isShown)) {
        if (trace.band) traces.push({ ...band(trace), ...where });
        traces.push({ ...painted(trace), ...where });
      }
      if (panel.coloraxis) {
        layout.coloraxis = { ...panel.coloraxis, colorbar: {
          orientation: "h", thickness: 10, len: Math.min(1, 500 / width), x: 0.5, y: 0,
          yanchor: "bottom", outlinewidth: 0, ...panel.coloraxis.colorbar,
        } };
      }
    });
    return [traces, layout];
  }

  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.form = figure.querySelector("form");
      this.plot = figure.querySelector(".plot");
      this.drawn = false;
      this.camera = { eye: { x: 1.7, y: 1.7, z: 1.1 }, center: { x: 0, y: 0, z: -0.2 } };
      this.form.addEventListener("input", () => this.draw());
      this.form.addEventListener("submit", (event) => event.preventDefault());
    }

    /** Panels, read when they are first needed. */
    get panels() {
      if (!this.content) {
        const text = this.figure.querySelector("script").textContent;
        const { arrays: stored, panels } = JSON.parse(text);
        const arrays = stored.map(numbers);
        const resolved = (value) => {
          if (typeof value !== "object" || value === null) return value;
          if ("$" in value) return arrays[value.$];
          if (Array.isArray(value)) return value.map(resolved);
          return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, resolved(v)]));
        };
        this.content = resolved(panels);
      }
      return this.content;
    }

    /** What is chosen, by the names of the controls. */
    chosen() {
      const found = {};
      for (const input of this.form.elements) {
        if (input.type === "range") {
          const text = JSON.parse(input.dataset.options)[input.value];
          found[input.name] = new Set([text]);
          input.parentElement.querySelector("output").value = text;
          input.setAttribute("aria-valuetext", text);
        } else if (input.matches("[type=checkbox], [type=radio]")) {
          const own = (found[input.name] ??= new Set());
          const paper = printing && this.form.querySelector(`[data-paper][name="${input.name}"]`);
          if (paper ? input === paper : input.checked) own.add(input.value);
        }
      }
      return found;
    }

    draw() {
      const chosen = this.chosen();
      const isShown = (item) =>
        Object.entries(item.when ?? {}).every(([name, text]) => chosen[name].has(text));
      const panels = this.panels.filter(isShown);
      this.solid = panels.some((panel) => panel.axes.scene);
      if (!panels.length) {
        this.clear();
        this.plot.textContent = "Nothing is switched on.";
        return;
      }
      if (!this.drawn) this.plot.textContent = "";
      const [traces, layout] = arranged(panels, isShown, this.plot.clientWidth, this.camera);
      this.plot.style.height = `${layout.height}px`;
      Plotly.react(this.plot, traces, layout, CONFIG);
      if (!this.drawn) this.plot.on("plotly_relayout", (change) => this.turn(change));
      this.drawn = true;
    }

    /** Turn all surfaces as one was turned. */
    turn(change) {
      const turned = Object.keys(change).find((key) => /^scene\d*\.camera$/.test(key));
      if (!turned || this.turning) return;
      this.camera = change[turned];
      const scenes = Object.keys(this.plot.layout).filter((key) => /^scene\d*$/.test(key));
      const others = scenes.map((scene) => [`${scene}.camera`, this.camera]);
      this.turning = true;
      Plotly.relayout(this.plot, Object.fromEntries(others)).finally(() => (this.turning = false));
    }

    clear() {
      if (this.drawn) Plotly.purge(this.plot);
      this.drawn = false;
    }
  }

  const charts = new Map([...document.querySelectorAll("figure")].map((f) => [f, new Chart(f)]));
  const redraw = () => charts.forEach((chart) => chart.drawn && chart.draw());

  // Charts are drawn when they come into sight. Surfaces that leave it give back what browsers have
  // few of, the context in which they are drawn.
  const sight = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const chart = charts.get(target);
      if (isIntersecting && !chart.drawn) chart.draw();
      if (!isIntersecting && chart.drawn && chart.solid) chart.clear();
    }
    requestAnimationFrame(() => performance.mark("drawn"));
  }, { rootMargin: "200px 0px" });
  charts.forEach((chart, figure) => sight.observe(figure));

  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    redraw();
  });
  prefersDark.addEventListener("change", redraw);

  let width = root.clientWidth;
  addEventListener("resize", () => {
    if (root.clientWidth === width || printing) return;
    width = root.clientWidth;
    redraw();
  });

  function print(start) {
    printing = start;
    root.classList.toggle("printing", start);
    charts.forEach((chart) => (start ? chart.draw() : chart.solid && chart.clear()));
    if (!start) redraw();
  }
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
})();
