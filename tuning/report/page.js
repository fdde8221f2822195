// Draw every chart from the figure beside it, in the page's colours, and again in others when the system turns
// from light to dark.
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

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
  const draw = ({ element, data, layout, title }) =>
    Plotly.react(element, data, { ...layout, template: template() }, config(title));
  Promise.all(drawings.map(draw)).then(() => (document.documentElement.dataset.drawn = drawings.length));
  dark.addEventListener("change", () => drawings.forEach(draw));
})();
