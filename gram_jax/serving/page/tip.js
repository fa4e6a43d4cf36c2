// The small box beside a token, on hover and on focus. Escape puts it away.

import { byId } from "./element.js";

const GAP = 6;

function place(box, token) {
  const spot = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const { width, height } = box.getBoundingClientRect();
  const left = Math.min(Math.max(spot.left, GAP), innerWidth - width - GAP);
  const above = spot.top - height - GAP;
  box.style.left = `${left + scrollX}px`;
  box.style.top = `${(above > 0 ? above : spot.bottom + GAP) + scrollY}px`;
}

export function showTip(token, ...content) {
  const box = byId("tip");
  box.replaceChildren(...content);
  box.hidden = false;
  place(box, token);
}

export function hideTip() {
  byId("tip").hidden = true;
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});
