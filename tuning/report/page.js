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
    if (rows.length < 9) continue;
    const label = document.createElement("label"), input = document.createElement("input");
    const count = document.createElement("output");
    label.className = "filter";
    input.type = "search";
    label.append("Filter", input, count);
    scroll.before(label);
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
      const shown = rows.filter((row) => !row.hidden).length;
      count.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
    });
  }
})();

// Draw every chart from the figure beside it, in the page's colours, and again in others when the system turns
// from light to dark, or for paper.
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)"), paper = window.matchMedia("print");
  const inDark = JSON.parse(document.getElementById("dark").textContent);
  const coloured = (figure) => {
    if (!dark.matches || paper.matches) return figure;
    const text = JSON.stringify(figure).replace(/#[0-9a-f]{6}/g, (colour) => inDark[colour] ?? colour);
    return JSON.parse(text);
  };

  const template = () => {
    const style = getComputedStyle(document.documentElement);
    const [ink, muted, line, raised] = ["--ink", "--muted", "--line", "--raised"].map((name) =>
      style.getPropertyValue(name).trim()
    );
    const axis = {
      gridcolor: line, linecolor: line, zerolinecolor: line, tickcolor: line, tickfont: { color: muted },
      title: { font: { color: muted, size: 12 }, standoff: 8 },
    };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: ink, size: 12, family: getComputedStyle(document.body).fontFamily },
        xaxis: axis, yaxis: axis, annotationdefaults: { bgcolor: style.getPropertyValue("--paper").trim(), opacity: 0.85 }, hoverlabel: { bgcolor: raised, bordercolor: line, font: { color: ink } },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: muted, activecolor: ink },
      },
      data: { heatmap: [{ textfont: { color: ink } }] },
    };
  };

  const config = (title) => ({
    responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    toImageButtonOptions: { format: "svg", filename: title },
  });
  const drawings = [...document.querySelectorAll(".chart")].map((chart) => {
    const { data, layout } = JSON.parse(chart.querySelector("script").textContent);
    return { element: chart.querySelector(".drawing"), data, layout, title: chart.querySelector("h3").textContent };
  });
  const draw = ({ element, title, ...figure }) => {
    const { data, layout } = coloured(figure);
    return Plotly.react(element, data, { ...layout, template: template() }, config(title));
  };
  Promise.all(drawings.map(draw)).then(() => (document.documentElement.dataset.drawn = drawings.length));
  dark.addEventListener("change", () => drawings.forEach(draw));
  const redraw = () => drawings.forEach((drawing) => draw(drawing).then(() => Plotly.Plots.resize(drawing.element)));
  window.addEventListener("beforeprint", redraw);
  window.addEventListener("afterprint", redraw);
})();
