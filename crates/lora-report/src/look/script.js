"use strict";
// The values under the pointer. Every curve carries its points; the page is whole without this script.
const figures = (v) => {
  const a = Math.abs(v);
  if (a === 0 || (Number.isInteger(v) && a < 1e15)) return v.toLocaleString("en-US").replaceAll(",", "\u202f");
  if (a < 1e-3) return v.toExponential(3).replace(/\.?0+e/, "e");
  if (a >= 1e5) return Math.round(v).toLocaleString("en-US").replaceAll(",", "\u202f");
  return v.toFixed(Math.min(7, Math.max(1, 4 - Math.floor(Math.log10(a))))).replace(/\.?0+$/, "");
};
const bytes = (v) => (v >= 1e9 ? (v / 1e9).toFixed(2) + " GB" : v >= 1e6 ? (v / 1e6).toFixed(1) + " MB" : v + " B");
const write = (v, unit) => (unit === "bytes" ? bytes(v) : figures(v) + (unit === "seconds" ? " s" : ""));
for (const plot of document.querySelectorAll(".plot")) {
  const { from, to, unit } = plot.dataset;
  const curves = [...plot.querySelectorAll("path[data-p]")].map((path) => ({
    name: path.dataset.n,
    colour: path.dataset.k,
    points: path.dataset.p.split(" ").map((pair) => pair.split(",").map(Number)),
  }));
  const line = plot.querySelector(".at");
  const tip = plot.querySelector(".tip");
  const hide = () => (line.style.display = tip.style.display = "none");
  const nearest = (points, step) => {
    let [low, high] = [0, points.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < step) low = middle + 1;
      else high = middle;
    }
    return low > 0 && step - points[low - 1][0] < points[low][0] - step ? points[low - 1] : points[low];
  };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width;
    if (at < -0.02 || at > 1.02) return hide();
    const wanted = +from + at * (to - from);
    let step = null;
    for (const { points } of curves) {
      const [near] = nearest(points, wanted);
      if (step === null || Math.abs(near - wanted) < Math.abs(step - wanted)) step = near;
    }
    if (step === null) return;
    tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: "step " + figures(step) }));
    for (const { name, colour, points } of curves) {
      const [own, value] = nearest(points, step);
      const row = document.createElement("div");
      const dot = document.createElement("i");
      dot.className = "k" + colour;
      row.append(dot, name + " " + write(value, unit) + (own === step ? "" : " (step " + figures(own) + ")"));
      tip.append(row);
    }
    const x = (step - from) / (to - from || 1);
    line.style.left = 100 * x + "%";
    tip.style.left = x < 0.5 ? `calc(${100 * x}% + 10px)` : "auto";
    tip.style.right = x < 0.5 ? "auto" : `calc(${100 - 100 * x}% + 10px)`;
    line.style.display = tip.style.display = "block";
  });
  plot.addEventListener("pointerleave", hide);
}
