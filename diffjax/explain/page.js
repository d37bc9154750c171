"use strict";
for (const slider of document.querySelectorAll("[data-slider]")) {
  const input = slider.querySelector("input");
  const output = slider.querySelector("output");
  const frames = slider.querySelectorAll(".frame");
  const show = () => {
    const chosen = Number(input.value) - 1;
    frames.forEach((frame, place) => { frame.hidden = place !== chosen; });
    output.textContent = frames[chosen].dataset.label;
    input.setAttribute("aria-valuetext", frames[chosen].dataset.label);
  };
  slider.classList.add("moves");
  input.addEventListener("input", show);
  show();
}
