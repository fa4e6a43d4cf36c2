// The question being written: a prompt and two or more responses, and what is wrong with them.

import { byId, element } from "./element.js";
import { letter } from "./numbers.js";

const FEWEST = 2;

/** A fault of one field, found before anything is sent. */
export class FieldFault extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

function responseField(place, text, removable) {
  const id = `response-${place}`;
  const area = element("textarea", { id, rows: 4, spellcheck: "false" });
  area.value = text;
  const remove = element("button", {
    type: "button", class: "plain", "data-remove": place,
    "aria-label": `Remove response ${letter(place)}`,
  }, "Remove");
  return element(
    "div",
    { class: "field" },
    element("div", { class: "line spread" },
      element("label", { for: id }, `Response ${letter(place)}`), removable ? remove : null),
    area,
    element("p", { class: "fault", id: `${id}-fault`, hidden: true }),
  );
}

/** The fields of the page. `changed` is called after each change, by a person or not. */
export class QuestionForm {
  constructor(changed) {
    this.most = Infinity; // responses that the server takes
    this.changed = changed;
    this.box = byId("responses");
    byId("add").addEventListener("click", () => this.add());
    this.box.addEventListener("click", (event) => {
      const place = event.target.dataset?.remove;
      if (place !== undefined) this.remove(Number(place));
    });
    byId("question").addEventListener("input", () => changed());
    this.show(["", ""]);
  }

  get texts() {
    return [...this.box.querySelectorAll("textarea")].map((area) => area.value);
  }

  /** What is written: {prompt, as, responses}. */
  get state() {
    return { prompt: byId("prompt").value, as: byId("prompt-as").value, responses: this.texts };
  }

  set state({ prompt, as, responses }) {
    byId("prompt").value = prompt;
    byId("prompt-as").value = as;
    this.show(responses);
    this.clearFaults();
    this.changed();
  }

  /**
   * What is sent for it: {prompt, responses}.
   *
   * @throws FieldFault where messages are not JSON.
   */
  question() {
    const { prompt, as, responses } = this.state;
    if (as === "text") return { prompt, responses };
    if (as === "chat") return { prompt: [{ role: "user", content: prompt }], responses };
    try {
      return { prompt: JSON.parse(prompt), responses };
    } catch (error) {
      const example = '[{"role": "user", "content": "…"}]';
      throw new FieldFault("prompt", `This is not JSON (${error.message}). Write ${example}.`);
    }
  }

  show(texts) {
    const removable = texts.length > FEWEST;
    this.box.replaceChildren(...texts.map((text, i) => responseField(i, text, removable)));
    this.limit(this.most);
  }

  limit(most) {
    this.most = most;
    const full = this.texts.length >= most;
    byId("add").disabled = full;
    byId("add").title = full ? `This server takes at most ${most} responses` : "";
  }

  add() {
    this.show([...this.texts, ""]);
    this.box.querySelector(".field:last-child textarea").focus();
    this.changed();
  }

  remove(place) {
    this.show(this.texts.filter((_, i) => i !== place));
    byId(`response-${Math.max(place - 1, 0)}`).focus();
    this.changed();
  }

  clearFaults() {
    for (const fault of document.querySelectorAll(".fault")) fault.hidden = true;
    for (const area of byId("question").querySelectorAll("textarea")) {
      area.removeAttribute("aria-invalid");
      area.removeAttribute("aria-describedby");
    }
  }

  /** Shows a message at the field that it is about; false where that is no field of the form. */
  fault(field, message) {
    const place = /^(?:items\[0\]\.)?responses?\[(\d+)\]/.exec(field)?.[1];
    const name = /^(?:items\[0\]\.)?prompt/.test(field) ? "prompt" : `response-${place}`;
    const area = byId(name);
    if (!area) return false;
    const fault = byId(`${name}-fault`);
    const goesOn = /^(is|has|holds|must) /.test(message); // "Response B" + "is empty"
    fault.textContent = area.labels[0].textContent + (goesOn ? " " : ": ") + message;
    fault.hidden = false;
    area.setAttribute("aria-invalid", "true");
    area.setAttribute("aria-describedby", fault.id);
    area.focus();
    return true;
  }
}
