"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [first, last] = data.range;
  const boxes = [...document.querySelectorAll(".box")].map((box) => ({
    box,
    hit: box.querySelector(".hit"),
    series: data.charts[Number(box.dataset.chart)],
    readout: box.closest("figure").querySelector(".readout"),
    cursor: box.querySelector(".cursor"),
  }));

  // As the page's other numbers: three digits, and an exponent where that is shorter.
  const short = (value) => {
    if (value === null) return "none";
    const [mantissa, exponent] = value.toExponential(2).split("e");
    const power = Number(exponent);
    if (value === 0 || (power >= -2 && power < 3)) return String(Number(value.toPrecision(3)));
    return `${Number(mantissa)}e${power}`;
  };

  const nearest = (steps, step) => {
    let low = 0;
    let high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1;
      else high = middle;
    }
    return low > 0 && step - steps[low - 1] <= steps[low] - step ? low - 1 : low;
  };

  const words = (series, step) =>
    series
      .filter((s) => s.step.length > 0)
      .map((s) => {
        const at = nearest(s.step, step);
        const range = s.low[at] === s.high[at] ? "" : ` (${short(s.low[at])} .. ${short(s.high[at])})`;
        const name = series.length > 1 ? `${s.name} ` : "";
        return `${name}${short(s.middle[at])}${range} at step ${Math.round(s.step[at]).toLocaleString("en-US")}`;
      })
      .join("; ");

  const show = (step) => {
    for (const { hit, series, readout, cursor } of boxes) {
      const text = words(series, step);
      readout.textContent = text;
      cursor.style.left = `${(100 * (step - first)) / (last - first)}%`;
      cursor.hidden = false;
      hit.setAttribute("aria-valuenow", String(Math.round(step)));
      hit.setAttribute("aria-valuetext", text);
    }
  };

  const rest = () => {
    for (const { readout, cursor } of boxes) {
      readout.textContent = readout.dataset.rest;
      cursor.hidden = true;
    }
  };

  for (const { box, hit, series } of boxes) {
    const steps = series.reduce((a, s) => (s.step.length > a.length ? s.step : a), []);
    if (steps.length === 0) continue;
    let at = steps.length - 1;
    hit.tabIndex = 0;
    hit.setAttribute("role", "slider");
    hit.setAttribute("aria-label", `${box.dataset.title}: step to read`);
    hit.setAttribute("aria-valuemin", String(first));
    hit.setAttribute("aria-valuemax", String(last));
    hit.setAttribute("aria-valuenow", String(last));
    const point = (event) => {
      const { left, width } = hit.getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - left) / width));
      at = nearest(steps, first + share * (last - first));
      show(steps[at]);
    };
    hit.addEventListener("pointermove", point);
    hit.addEventListener("pointerdown", point);
    hit.addEventListener("pointerleave", () => {
      if (document.activeElement !== hit) rest();
    });
    hit.addEventListener("focus", () => show(steps[at]));
    hit.addEventListener("blur", rest);
    hit.addEventListener("keydown", (event) => {
      if (event.target !== hit) return;
      const page = Math.max(1, Math.round(steps.length / 10));
      const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -page, PageUp: page };
      if (event.key === "Home") at = 0;
      else if (event.key === "End") at = steps.length - 1;
      else if (event.key === "Escape") {
        hit.blur();
        return;
      } else if (event.key in moves) at = Math.min(steps.length - 1, Math.max(0, at + moves[event.key]));
      else return;
      event.preventDefault();
      show(steps[at]);
    });
  }
})();
