// What is selected of the things that rows and points stand for: each source says which it lets through, or null for all.
// What all of them let through is selected; `listeners` hear of it.
const selection = { sources: new Map(), names: null, listeners: [] };
const select = (source, names) => {
  if (names) selection.sources.set(source, names);
  else selection.sources.delete(source);
  const all = [...selection.sources.values()];
  selection.names = all.length ? new Set([...all[0]].filter((name) => all.every((set) => set.has(name)))) : null;
  selection.listeners.forEach((hear) => hear(selection.names));
};

// Tables: a heading sorts, and a field above long ones keeps the rows that hold all of its words.
(() => {
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text.replace("\u2212", "-").replace(/,/g, ""));
    return [text, /^[-+\u2212]?[\d.]/.test(text) ? number : NaN];
  };
  const compare = (a, b) => {  // numbers before words, nothing last
    if (!Number.isNaN(a[1]) && !Number.isNaN(b[1])) return a[1] - b[1];
    if (Number.isNaN(a[1]) !== Number.isNaN(b[1])) return Number.isNaN(a[1]) ? 1 : -1;
    return a[0].localeCompare(b[0]);
  };
  for (const table of document.querySelectorAll("main table")) {
    const [body] = table.tBodies, rows = [...body.rows], scroll = table.parentElement;
    const heads = [...table.tHead.rows[0].cells];
    if (table.scrollWidth > scroll.clientWidth || rows.length > 20) scroll.classList.add("wide");
    if (rows.length < 3) continue;
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.textContent = head.textContent;
      button.title = "sort";
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const number = head.classList.contains("number"), now = head.getAttribute("aria-sort");
        const next = now ? (now === "ascending" ? "descending" : "ascending") : number ? "descending" : "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", next);
        const known = rows.map((row) => [value(row, column), row]);
        known.sort(([a], [b]) => {
          const missing = (v) => v[0] === "" || v[0] === "\u2013";
          if (missing(a) !== missing(b)) return missing(a) ? 1 : -1;
          return next === "ascending" ? compare(a, b) : compare(b, a);
        });
        body.append(...known.map(([, row]) => row));
      });
    });
    const named = rows.some((row) => row.id), count = document.createElement("output");
    let words = [];
    const fits = (row) => words.every((word) => row.textContent.toLowerCase().includes(word));
    const show = () => {
      const { names } = selection;
      for (const row of rows) row.hidden = !(fits(row) && (!named || !names || names.has(row.id)));
      const shown = rows.filter((row) => !row.hidden).length;
      count.textContent = shown < rows.length || words.length ? `${shown} of ${rows.length} rows` : "";
    };
    if (named) selection.listeners.push(show);
    if (rows.length < 9) continue;
    const label = document.createElement("label"), input = document.createElement("input");
    label.className = "filter";
    input.type = "search";
    label.append("Filter", input, count);
    scroll.before(label);
    input.addEventListener("input", () => {
      words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      if (named) select(table, words.length ? new Set(rows.filter(fits).map((row) => row.id)) : null);
      else show();
    });
    selection.listeners.push((names) => {
      if (names || !words.length || !named) return;
      input.value = "";
      words = [];
      show();
    });
  }
})();

// Draw every chart from the figure beside it, in the page's colours, and again in others when the system turns
// from light to dark, or for paper.
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  // While it prints, which browsers announce before their styles are those of paper and whose width they do not tell:
  // the colours of paper in page.css, and in pixels what A4 has between wide margins.
  const PAPER = { "--ink": "#000000", "--muted": "#44505c", "--line": "#b8c0c8", "--raised": "#ffffff", "--paper": "#ffffff" };
  const PAPER_WIDTH = 640;
  let printing = false;
  const inDark = JSON.parse(document.getElementById("dark").textContent);
  const coloured = (figure) => {
    if (!dark.matches || printing) return figure;
    const text = JSON.stringify(figure).replace(/#[0-9a-f]{6}/g, (colour) => inDark[colour] ?? colour);
    return JSON.parse(text);
  };

  const template = () => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => (printing ? PAPER[name] : style.getPropertyValue(name).trim());
    const [ink, muted, line, raised, paper] = ["--ink", "--muted", "--line", "--raised", "--paper"].map(colour);
    const axis = {
      gridcolor: line, linecolor: line, zerolinecolor: line, tickcolor: line, tickfont: { color: muted },
      title: { font: { color: muted, size: 12 }, standoff: 8 },
    };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: ink, size: 12, family: getComputedStyle(document.body).fontFamily },
        xaxis: axis, yaxis: axis, annotationdefaults: { bgcolor: paper, opacity: 0.85 }, hoverlabel: { bgcolor: raised, bordercolor: line, font: { color: ink } },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: muted, activecolor: ink },
      },
      data: { heatmap: [{ textfont: { color: ink } }] },
    };
  };

  // A finger on a chart scrolls the page; a mouse draws a box, which selects where points stand for trials.
  const finger = window.matchMedia("(pointer: coarse)");
  const namesOf = (trace, points) => (trace.meta?.trial ? [trace.meta.trial] : points.map((n) => trace.customdata[n]));
  const isNamed = ({ data }) => data.some((trace) => trace.meta?.trial || trace.customdata);
  const config = ({ title, named }) => ({
    responsive: true, displaylogo: false, toImageButtonOptions: { format: "svg", filename: title },
    modeBarButtons: [["toImage", ...(named ? ["select2d", "lasso2d"] : []), "zoom2d", "pan2d", "resetScale2d"]],
  });
  const drawings = [...document.querySelectorAll(".chart")].map((chart) => {
    const { data, layout } = JSON.parse(chart.querySelector("script").textContent);
    const title = chart.querySelector("h3").textContent;
    const opacities = data.map((trace) => trace.opacity ?? 1);  // plotly writes into data what is faded
    return { element: chart.querySelector(".drawing"), data, layout, title, opacities, named: isNamed({ data }) };
  });
  const draw = async (drawing) => {
    const { element, named, ...figure } = drawing, { data, layout } = coloured(figure);
    const dragmode = finger.matches ? false : named ? "select" : "zoom";
    const width = printing ? PAPER_WIDTH : undefined;
    await Plotly.react(element, data, { dragmode, ...layout, width, template: template() }, config(drawing));
    if (named) mark(drawing, selection.names);
  };

  // Selected trials stand out: the others' points and lines fade.
  const mark = ({ element, data, opacities }, names) => {
    const inside = (trace) => trace.customdata.flatMap((name, n) => (names.has(name) ? [n] : []));
    const points = data.map((trace) => (names && !trace.meta?.trial && trace.customdata ? inside(trace) : null));
    const faint = (trace) => names && trace.meta?.trial && !names.has(trace.meta.trial);
    const opacity = data.map((trace, n) => (faint(trace) ? 0.06 : opacities[n]));
    return Plotly.restyle(element, { selectedpoints: points, opacity });
  };
  const listen = (drawing) => {
    const { element, data } = drawing;
    element.on("plotly_selected", (event) => {
      if (!event?.points?.length) return;
      const byPlace = new Map();  // a box on each of several axes: the lines that pass through all of them
      for (const { curveNumber, pointNumber, x } of event.points) {
        const trace = data[curveNumber], place = drawing.layout.meta?.axes ? x : 0;
        if (!byPlace.has(place)) byPlace.set(place, new Set());
        namesOf(trace, [pointNumber]).forEach((name) => byPlace.get(place).add(name));
      }
      const [first, ...others] = byPlace.values();
      select(drawing, new Set([...first].filter((name) => others.every((set) => set.has(name)))));
    });
    element.on("plotly_deselect", () => select(drawing, null));
    element.on("plotly_click", ({ points: [{ curveNumber, pointNumber }] }) => {
      const trace = data[curveNumber];
      if (trace.meta?.trial || trace.customdata) select("click", new Set(namesOf(trace, [pointNumber])));
    });
  };
  const clear = () => {
    for (const { element, named } of drawings) if (named) Plotly.relayout(element, { selections: [] });
    for (const source of [...selection.sources.keys()]) select(source, null);
  };
  const bar = document.createElement("p");  // what is selected, with links to the rows
  bar.className = "selected";
  bar.setAttribute("role", "status");
  bar.hidden = true;
  document.body.append(bar);
  const all = new Set([...document.querySelectorAll("tr[id]")].map((row) => row.id));
  const say = (names) => {
    bar.hidden = !names;
    if (!names) return;
    const links = [...names].slice(0, 5).map((name) => Object.assign(document.createElement("a"), { href: `#${name}`, textContent: name }));
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: "show all" });
    button.addEventListener("click", clear);
    const more = names.size > links.length ? ` and ${names.size - links.length} more` : "";
    bar.replaceChildren(`${names.size} of ${all.size}: `, ...links.flatMap((link) => [link, " "]), more, button);
  };

  Promise.all(drawings.map(draw)).then(() => {
    const named = drawings.filter((drawing) => drawing.named);
    named.forEach(listen);
    selection.listeners.push((names) => named.forEach((drawing) => mark(drawing, names)), say);
    document.documentElement.dataset.drawn = drawings.length;
  });
  dark.addEventListener("change", () => drawings.forEach(draw));
  const print = (now) => {
    printing = now;
    drawings.forEach((drawing) => draw(drawing).then(() => now || Plotly.Plots.resize(drawing.element)));
  };
  window.addEventListener("beforeprint", () => print(true));
  window.addEventListener("afterprint", () => print(false));
})();
