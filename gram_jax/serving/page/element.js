// Elements made out of data. Text stays text: nothing here reads markup.

/**
 * An element. Attributes that are null or false are left out, true is an empty one; children that
 * are null are left out.
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** The element with this id, which the page has. */
export function byId(id) {
  return document.getElementById(id);
}
